"""What `morph chat` and `morph complete` say to a server, and what they show of its answer."""

import time
import unicodedata
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from morphserve.configs.errors import MorphError
from morphserve.morphcli.bench.http import (
    Answer,
    HttpError,
    ServerSentEvents,
    bearer,
    open_stream,
)

DEFAULT_URL = "http://127.0.0.1:8000"


class ServerRefused(MorphError):
    """A server is not there, or does not do what it was asked; the message says why."""


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None  # of completions
    delta: _Message | None = None  # of chats
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    completion_tokens: int = 0
    morph: dict[str, Any] | None = None  # tokens by precision; None: another kind of server


class _Error(msgspec.Struct):
    message: str


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: _Error | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Refusal(msgspec.Struct):
    error: _Error


@dataclass(slots=True)
class Reply:
    """What has arrived of an answer; it is filled while the pieces are read."""

    text: str = ""
    usage: Usage | None = None
    times_s: list[float] = field(default_factory=list)  # monotonic clock, one per piece of text

    def summary(self) -> str:
        """`12 tokens, 34 tok/s, 75 % full, 25 % int4`."""
        if self.usage is None:
            return "stopped"
        tokens = self.usage.completion_tokens
        parts = [f"{tokens} token{'' if tokens == 1 else 's'}"]
        if len(self.times_s) > 1 and (seconds := self.times_s[-1] - self.times_s[0]) > 0:
            parts.append(f"{(tokens - 1) / seconds:.0f} tok/s")
        return ", ".join(parts + _shares(self.usage.morph or {}))


def _shares(morph: Mapping[str, Any]) -> list[str]:
    """How much of the answer was made at each precision."""
    counts = {name: morph.get(name) or 0 for name in ("full", "int8", "int4")}
    total = sum(counts.values())
    return [f"{count / total:.0%} {name}" for name, count in counts.items() if count]


@dataclass(frozen=True, slots=True)
class Server:
    """A server with an OpenAI-compatible API."""

    url: str
    api_key: str | None = None

    async def first_model(self) -> str:
        """The name of the first model that it lists."""
        models = msgspec.json.decode(await self._whole("GET", "/v1/models"), type=_Models).data
        if not models:
            raise ServerRefused(f"{self.url} lists no model: name one with --model")
        return models[0].id

    async def complete(self, fields: Mapping[str, Any]) -> bytes:
        """The whole response to a completion, as JSON."""
        return await self._whole("POST", "/v1/completions", msgspec.json.encode(fields))

    async def stream(
        self, path: str, fields: Mapping[str, Any], reply: Reply
    ) -> AsyncIterator[str]:
        """Text as it is made; `reply` is filled meanwhile, and whole when this ends."""
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        body = msgspec.json.encode({**fields, **streamed})
        async with self._ask("POST", path, body) as answer:
            async for data in ServerSentEvents(answer):
                if data == b"[DONE]":
                    return
                chunk = msgspec.json.decode(data, type=_Chunk)
                if chunk.error is not None:
                    raise ServerRefused(f"{self.url} broke off: {chunk.error.message}")
                reply.usage = chunk.usage or reply.usage
                if text := _text(chunk.choices):
                    reply.times_s.append(time.monotonic())
                    reply.text += text
                    yield text
        raise ServerRefused(self._broken_off())

    async def _whole(self, method: str, path: str, body: bytes = b"") -> bytes:
        async with self._ask(method, path, body) as answer:
            return await answer.read()

    @asynccontextmanager
    async def _ask(self, method: str, path: str, body: bytes) -> AsyncIterator[Answer]:
        """The answer, of status 200. Raises ServerRefused for anything else."""
        try:
            async with open_stream(self.url, method, path, body, bearer(self.api_key)) as answer:
                if answer.status != 200:
                    raise ServerRefused(self._refusal(answer.status, await answer.read()))
                yield answer
        except ConnectionResetError as error:
            raise ServerRefused(self._broken_off()) from error
        except OSError as error:
            raise ServerRefused(
                f"no server answers at {self.url}: start one with `morph serve`, or give its URL"
            ) from error
        except (HttpError, msgspec.MsgspecError) as error:
            raise ServerRefused(f"{self.url} does not speak this API: {error}") from error

    def _broken_off(self) -> str:
        return f"{self.url} ended the connection before the answer was whole"

    def _refusal(self, status: int, body: bytes) -> str:
        if status == 401:
            return f"{self.url} wants an API key: set MORPH_API_KEY, or give --api-key"
        try:
            said = msgspec.json.decode(body, type=_Refusal).error.message
        except msgspec.MsgspecError:
            said = f"status {status}"
        if status in (429, 503):
            return f"{self.url} takes no request now: {said}; try again in a moment"
        return f"{self.url} refuses this: {said}"


def _text(choices: Sequence[_Choice]) -> str:
    for choice in choices:
        if choice.text is not None:
            return choice.text
        if choice.delta is not None:
            return choice.delta.content or ""
    return ""


def printable(text: str) -> str:
    """The text without the control characters that would steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
