"""HTTP/1.1 as a client: one request per connection, the answer streamed."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools

from morphserve.configs.errors import ConfigError


class HttpError(Exception):
    """An answer that is not a completion."""


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int
    is_tls: bool
    prefix: str  # of every path, without a slash at the end

    @property
    def name(self) -> str:
        """As a Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def address(url: str) -> Address:
    """Of `http://HOST:PORT` or https, which may end in /v1; raises ConfigError for another URL."""
    try:
        parts = urlsplit(url)
        is_tls, host = parts.scheme == "https", parts.hostname
        port = parts.port or (443 if is_tls else 80)
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or host is None or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is no server's URL: write http://HOST:PORT")
    return Address(host, port, is_tls, parts.path.rstrip("/").removesuffix("/v1"))


def host_and_port(url: str) -> tuple[str, int]:
    """Of a server's URL; raises ConfigError for another."""
    return address(url)[:2]


@cache
def tls_context() -> ssl.SSLContext:
    """Trusts whom the system trusts."""
    return ssl.create_default_context()


def bearer(api_key: str | None) -> dict[str, str]:
    """The headers that carry the key of a server, if it has one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


class Answer:
    """Status and body of one response, filled as bytes arrive."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self.is_complete = False  # nothing of it is missing
        self._has_status = False

    @property
    def status(self) -> int:
        return self._parser.get_status_code()

    def on_headers_complete(self) -> None:
        self._has_status = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self.is_complete = True

    async def read_head(self) -> None:
        while not self._has_status:
            if not await self._feed():
                raise HttpError("the connection ended without an answer")

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives; it ends where the response or the connection ends."""
        while True:
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                yield piece
            if self.is_complete or not await self._feed():
                break
        for piece in self._pieces:
            yield piece

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def _feed(self) -> bool:
        data = await self._reader.read(64 * 1024)
        try:
            if data:
                self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise HttpError(f"not HTTP: {error}") from error
        return bool(data)


@asynccontextmanager
async def open_stream(
    url: str, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> AsyncIterator[Answer]:
    """A request over a connection of its own, which is closed at the end."""
    at = address(url)
    tls = tls_context() if at.is_tls else None
    reader, writer = await asyncio.open_connection(at.host, at.port, ssl=tls)
    fields = {
        "Host": at.name,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **(headers or {}),
    }
    try:
        lines = [f"{method} {at.prefix}{path} HTTP/1.1"]
        lines += [f"{name}: {text}" for name, text in fields.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()
        answer = Answer(reader)
        await answer.read_head()
        yield answer
    finally:
        writer.close()


def post_stream(
    url: str, path: str, body: bytes, headers: Mapping[str, str] | None = None
) -> AbstractAsyncContextManager[Answer]:
    """POST of JSON."""
    return open_stream(url, "POST", path, body, headers)


class ServerSentEvents:
    """The `data:` fields of a response, one per event."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        rest = b""
        async for piece in self._answer.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()
