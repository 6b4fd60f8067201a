"""HTTP/1.1 as a client: one request per connection, the answer streamed."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import urlsplit

import httptools

from morphserve.configs.errors import ConfigError


class HttpError(Exception):
    """An answer that is not a completion."""


def host_and_port(url: str) -> tuple[str, int]:
    """Of a plain `http://host:port`; raises ConfigError for anything else."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        parts, host, port = urlsplit(""), None, 0
    if parts.scheme != "http" or host is None or parts.path.strip("/"):
        raise ConfigError(f"{url!r} is no server's URL: write http://HOST:PORT, without a path")
    return host, port


def bearer(api_key: str | None) -> dict[str, str]:
    """The headers that carry the key of a server, if it has one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


class Answer:
    """Status and body of one response, filled as bytes arrive."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._complete = False
        self._has_status = False

    @property
    def status(self) -> int:
        return self._parser.get_status_code()

    def on_headers_complete(self) -> None:
        self._has_status = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._complete = True

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
            if self._complete or not await self._feed():
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
    host, port = host_and_port(url)
    reader, writer = await asyncio.open_connection(host, port)
    fields = {
        "Host": f"{host}:{port}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **(headers or {}),
    }
    try:
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {text}" for name, text in fields.items())]
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
