"""Connections: bounded in number, time and memory, whatever their clients do."""

import asyncio
import contextlib
import logging
import resource
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from morphserve.runtime.server.admission import Admission
from morphserve.runtime.server.endpoint import JSON
from morphserve.runtime.server.errors import ApiError, bad_request
from morphserve.runtime.server.middleware import MAX_HEADER_BYTES

MAX_CONNECTIONS = 8192
MAX_PIPELINED = 16  # requests sent ahead on one connection
HEAD_TIMEOUT_S = 20.0  # from a connection's start, or a request's first byte, to its last header
KEEP_ALIVE_S = 30  # between a response and the next request
STALL_TIMEOUT_S = 60.0  # for a client to take what is buffered for it, at most 64 KiB and a chunk
_LINGER_S = 2.0  # a client that still sends gets its refusal before the connection is gone
_UPGRADE_HEADERS = frozenset({b"upgrade", b"http2-settings"})  # the wish for another protocol
_MAX_LINGERING = 64  # refused connections, beside the open ones
_SPARE_FILES = 64 + _MAX_LINGERING  # open files for all but connections that are served
_HEAD_BYTES = MAX_HEADER_BYTES + 16 * 1024  # the request line and separators come on top


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients are allowed together and each. Times in seconds."""

    max_connections: int = MAX_CONNECTIONS
    head_s: float = HEAD_TIMEOUT_S
    keep_alive_s: int = KEEP_ALIVE_S
    stall_s: float = STALL_TIMEOUT_S


def limits_here() -> Limits:
    """The limits on this machine, where this process may have so many open files."""
    return Limits(max_connections=min(MAX_CONNECTIONS, max(1, _raise_open_files() - _SPARE_FILES)))


def _raise_open_files() -> int:
    """Takes as many open files as the process is allowed at all; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse; then it stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS + _SPARE_FILES if soft == resource.RLIM_INFINITY else soft


def http_config(app: Starlette, limits: Limits, admission: Admission) -> uvicorn.Config:
    """uvicorn's settings; connections are ours, and `admission` counts those that are refused."""
    connection = partial(Connection, limits=limits, admission=admission, lingering=set())
    return uvicorn.Config(
        app,
        http=connection,  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.ERROR,  # no line for every client that sends nonsense
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=1,  # responses are complete by then; a stuck reader is cut off
    )


class _Timer:
    """Calls `at_end` after so many seconds, unless it is stopped."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, at_end: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._seconds = seconds
        self._at_end = at_end
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Goes on if it runs already."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._at_end)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class Connection(HttpToolsProtocol):
    """One client's connection: uvicorn's, with an end to every wait."""

    def __init__(
        self,
        *args: Any,
        limits: Limits,
        admission: Admission,
        lingering: set["Connection"],
        **kwargs: Any,
    ) -> None:
        """`lingering`: of this server, those that were refused and are not gone yet."""
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._admission = admission
        self._lingering = lingering
        # The rest of a request must come in time; a body that is being read has its own limit.
        self._incoming = _Timer(self.loop, limits.head_s, self._on_late_request)
        # The client must take what is buffered for it; with its connection its request is aborted.
        self._outgoing = _Timer(self.loop, limits.stall_s, lambda: self.transport.abort())
        self._unparsed_bytes = 0  # since a part of a request was complete
        self._fed = b""  # what the parser was given last
        self._in_head = self._in_body = self._refused = False
        self._running: RequestResponseCycle | None = None  # `cycle` may be of a request sent ahead

    @property
    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            return self._turn_away()
        self._incoming.start()

    def _turn_away(self) -> None:
        message = "too many connections are open"
        self._refuse(self._admission.unavailable("connections", message, 1.0))
        self.connections.discard(self)  # it keeps nobody else out
        if len(self._lingering) >= _MAX_LINGERING:
            return self.transport.close()
        self._lingering.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lingering.discard(self)
        self._incoming.stop()
        self._outgoing.stop()
        self._unset_keepalive_if_required()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    # What comes in

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if not self._is_answering:
            self._incoming.start()
        self._unparsed_bytes += len(data)
        self._fed = data
        super().data_received(data)
        if self._unparsed_bytes > _HEAD_BYTES:
            limit = f"{MAX_HEADER_BYTES // 1024} KiB"
            self._refuse(ApiError(431, f"the request's head is larger than {limit}"))

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # after the body come trailers, which nobody reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the parser stops here; _unsupported_upgrade_warning goes on without the wish
        if len(self.pipeline) >= MAX_PIPELINED:
            return self._refuse(bad_request(f"more than {MAX_PIPELINED} requests were sent ahead"))
        was_answering = self._is_answering
        super().on_headers_complete()
        if not was_answering:
            self._running = self.cycle
        self._in_head, self._in_body = False, True
        self._unparsed_bytes = 0
        self._incoming.stop()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body = False
        self._unparsed_bytes = 0
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """The request goes on as if it had not asked for another protocol, body included.

        The parser takes what follows the head for the other protocol's bytes: another one is
        given the head again, without that wish.
        """
        stopped = sys.exc_info()[1]
        assert isinstance(stopped, httptools.HttpParserUpgrade)
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        rest = self._fed[stopped.args[0] :]
        if method == b"CONNECT":
            return self._refuse(bad_request("this server is no proxy"))
        kept = [field for field in self.headers if field[0] not in _UPGRADE_HEADERS]
        head = [b"%b %b HTTP/%b" % (method, self.url, version), *map(b": ".join, kept)]
        self.parser = httptools.HttpRequestParser(self)
        self._unparsed_bytes = 0
        self.data_received(b"\r\n".join([*head, b"", rest]))

    def _on_late_request(self) -> None:
        if self._in_head:
            seconds = f"{self._limits.head_s:.0f} s"
            return self._refuse(ApiError(408, f"the request's head did not arrive in {seconds}"))
        self._close()  # nothing of a request, or the rest of a body that was not wanted

    # What goes out

    def pause_writing(self) -> None:
        super().pause_writing()
        self._outgoing.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._outgoing.stop()
        if self.transport.is_closing():
            self._outgoing.start()

    def on_response_complete(self) -> None:
        ahead = self.pipeline[-1][0] if self.pipeline else self._running
        super().on_response_complete()
        self._running = ahead
        if self.transport.is_closing():
            self._outgoing.start()
        elif not self._is_answering and (self._in_head or self._in_body):
            self._incoming.start()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._outgoing.start()

    def _close(self) -> None:
        self.transport.close()
        self._outgoing.start()

    # What is refused before it is a request

    def send_400_response(self, msg: str) -> None:
        self._refuse(bad_request("this is not a valid HTTP/1.1 request"))

    def _refuse(self, error: ApiError) -> None:
        """Ends the connection with this answer, or without one in the middle of another."""
        if self._refused:
            return
        self._refused = True
        if self._is_answering:
            return self.transport.abort()
        self._incoming.stop()
        self._write(error)
        self.transport.write_eof()
        # Closing now would reset the connection, and what still comes would undo the answer.
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def _write(self, error: ApiError) -> None:
        body = error.body()
        head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
        head += [f"{name}: {value}" for name, value in error.headers.items()]
        head += [f"content-type: {JSON}", f"content-length: {len(body)}", "connection: close"]
        head += [f"x-request-id: {uuid.uuid4().hex}", "", ""]
        self.transport.write("\r\n".join(head).encode() + body)
