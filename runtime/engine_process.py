"""The engine's own process: messages in, steps and snapshots out, over one local socket."""

import contextlib
import faulthandler
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

import msgspec

from morphserve.configs.errors import MorphError
from morphserve.configs.schema import EngineConfig
from morphserve.runtime.frames import FrameSplitter, encode_frame
from morphserve.runtime.messages import (
    Abort,
    Event,
    Events,
    Failed,
    FromEngine,
    Hello,
    Pin,
    Refused,
    Shutdown,
    Snapshot,
    Step,
    Submit,
    ToEngine,
)

IDLE_WAIT_S = 0.02  # between steps without work, so that the controller can restore layers
SNAPSHOT_INTERVAL_S = 0.1
MAX_UNSENT_BYTES = 4 << 20  # tokens that the HTTP process has not read; then steps wait
_READ_BYTES = 1 << 20
_LAST_WORDS_S = 1.0  # for sending why the engine ends

logger = logging.getLogger("morphserve.runtime.engine_process")  # not __main__


class EngineLike(Protocol):
    """What the loop needs of an engine."""

    def hello(self) -> Hello: ...
    def submit(self, message: Submit) -> Refused | None: ...
    def abort(self, request_id: str) -> None: ...
    def pin(self, rung: int | None) -> None: ...
    def take_events(self) -> list[Event]: ...
    def step(self) -> Step | None: ...
    @property
    def has_work(self) -> bool: ...
    def snapshot(self) -> Snapshot: ...


EngineFactory = Callable[[EngineConfig], EngineLike]


class Disconnected(Exception):
    """The HTTP process closed its end of the socket."""


class Link:
    """The engine's end of the socket; sending never blocks, what does not fit waits here.

    Whoever sends looks at `is_full` first, which bounds what waits.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._splitter = FrameSplitter()
        self._unsent = bytearray()

    @property
    def is_behind(self) -> bool:
        """Whether the HTTP process has not yet read what was sent."""
        return bool(self._unsent)

    @property
    def is_full(self) -> bool:
        """Whether the HTTP process stalls: nothing more should be made for it."""
        return len(self._unsent) > MAX_UNSENT_BYTES

    def send(self, message: FromEngine) -> None:
        self._unsent += encode_frame(message)
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes now."""
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            raise Disconnected from error

    def flush_within(self, timeout_s: float) -> None:
        """Sends everything, waiting at most this long for the other side to read."""
        deadline = time.monotonic() + timeout_s
        while self._unsent and (left := deadline - time.monotonic()) > 0:
            select.select([], [self._sock], [], left)
            self.flush()

    def receive(self, timeout_s: float) -> list[bytes]:
        """Bodies of the messages that arrived, waiting at most `timeout_s` for the first."""
        writing = [self._sock] if self._unsent else []
        readable, writable, _ = select.select([self._sock], writing, [], timeout_s)
        if writable:
            self.flush()
        if not readable:
            return []
        try:
            data = self._sock.recv(_READ_BYTES)
        except OSError as error:
            raise Disconnected from error
        if not data:
            raise Disconnected
        return self._splitter.feed(data)


def run_engine(
    sock: socket.socket, make_engine: EngineFactory, started_s: float | None = None
) -> int:
    """Serves the process at the other end of `sock` until it leaves; returns the exit code.

    The first message received is the EngineConfig; the first sent is Hello or Failed.
    `started_s`: when importing began, as time.monotonic() tells it; None: now.
    """
    started_s = time.monotonic() if started_s is None else started_s
    link = Link(sock)
    try:
        engine, rest = _start(link, make_engine, started_s)
        _loop(link, engine, rest)
    except Disconnected:
        return 0
    except MorphError as error:
        return _fail(link, str(error), error.exit_code)
    except Exception as error:
        logger.exception("the engine failed")
        return _fail(link, f"the engine failed: {type(error).__name__}: {error}", 1)
    return 0


def _start(
    link: Link, make_engine: EngineFactory, started_s: float
) -> tuple[EngineLike, list[bytes]]:
    """The engine, and message bodies that arrived behind its config."""
    bodies: list[bytes] = []
    while not bodies:
        bodies = link.receive(timeout_s=1.0)
    engine = make_engine(msgspec.msgpack.decode(bodies[0], type=EngineConfig))
    gc.collect()
    gc.freeze()  # what lives as long as the process must not be searched for garbage in a step
    link.send(_with_import_time(engine.hello(), time.monotonic() - started_s))
    link.send(engine.snapshot())
    return engine, bodies[1:]


def _with_import_time(hello: Hello, start_s: float) -> Hello:
    """The part of the start that the engine did not count itself is importing its modules."""
    phases = {"import": start_s - sum(hello.startup_s.values())} | hello.startup_s
    return msgspec.structs.replace(hello, startup_s=phases)


def _loop(link: Link, engine: EngineLike, bodies: list[bytes]) -> None:
    decoder = msgspec.msgpack.Decoder(ToEngine)
    next_snapshot_s = 0.0
    while True:
        for body in bodies:
            message = decoder.decode(body)
            if isinstance(message, Shutdown):
                return
            _handle(link, engine, message)
        if link.is_full:
            bodies = link.receive(IDLE_WAIT_S)
            continue
        if step := engine.step():
            link.send(step)
        if events := engine.take_events():
            link.send(Events(events))
        now = time.monotonic()
        if now >= next_snapshot_s and not link.is_behind:
            link.send(engine.snapshot())
            next_snapshot_s = now + SNAPSHOT_INTERVAL_S
        bodies = link.receive(0.0 if engine.has_work else IDLE_WAIT_S)


def _handle(link: Link, engine: EngineLike, message: Submit | Abort | Pin) -> None:
    match message:
        case Abort():
            engine.abort(message.request_id)
        case Pin():
            engine.pin(message.rung)
        case Submit():
            if refused := engine.submit(message):
                link.send(refused)


def _fail(link: Link, message: str, exit_code: int) -> int:
    try:
        link.send(Failed(message, exit_code))
        link.flush_within(_LAST_WORDS_S)
    except Disconnected:
        logger.error("%s", message)
    return exit_code


def _make_engine(config: EngineConfig) -> EngineLike:
    from morphserve.runtime.build import build_engine
    from morphserve.runtime.server.logs import start_logging

    start_logging(config.log_format)
    return build_engine(config)


def _import_engine() -> None:
    """Imports all that an engine needs, before anybody asks for one.

    Without garbage collections, which search again and again what is there to stay.
    """
    gc.disable()
    with contextlib.suppress(Exception):  # it is raised again, and told, when an engine is made
        importlib.import_module("morphserve.runtime.build")
    gc.freeze()
    gc.enable()


def main(make_engine: EngineFactory | None = None) -> int:
    """Entry point: the socket's descriptor is the last argument; signals are for the parent."""
    started_s = time.monotonic()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.raiseExceptions = False  # a log that cannot be written is no reason to stop
    if sys.stderr is not None:
        faulthandler.enable()  # SIGABRT, which the supervisor sends to a stuck engine, tells where
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    sock = socket.socket(fileno=int(sys.argv[-1]))
    if make_engine is None:
        _import_engine()
    return run_engine(sock, make_engine or _make_engine, started_s)


def leave(exit_code: int) -> NoReturn:
    """Ends the process at once: taking torch apart takes half a second, and nothing is to save."""
    logging.shutdown()
    os._exit(exit_code)


if __name__ == "__main__":
    leave(main())
