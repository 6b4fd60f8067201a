"""What all endpoints share, and the way from a request's fields to a job that fits."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from morphserve.configs.schema import Slo
from morphserve.runtime.engine_client import EngineClient, EngineDead, QueueTimeout
from morphserve.runtime.exposition import Server
from morphserve.runtime.messages import Hello
from morphserve.runtime.metrics import Metrics
from morphserve.runtime.server.admission import Admission, Ticket
from morphserve.runtime.server.errors import ApiError, bad_request
from morphserve.runtime.server.watchdog import LoopWatchdog
from morphserve.runtime.tokenizer import PromptTooLong, TemplateError, Tokenizer

_TOO_LONG = "context_length_exceeded"
T = TypeVar("T")
_EXPOSED_S = 0.1  # the engine's numbers come as often; making the text takes a millisecond
_DRAINING = "the server is shutting down"
_LONG_TEXT = 4096  # characters; tokenising more would hold up other streams for milliseconds


@dataclass(slots=True)
class Serving:
    """One served model."""

    engine: EngineClient
    tokenizer: Tokenizer
    metrics: Metrics
    model_name: str
    admission: Admission
    url: str = ""  # once it listens
    created: int = field(default_factory=lambda: int(time.time()))
    slo: Slo = Slo()  # that the server promises
    watchdog: LoopWatchdog = field(default_factory=LoopWatchdog)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)  # takes no new requests
    _exposed: bytes = b""
    _exposed_s: float = float("-inf")

    @property
    def draining(self) -> bool:
        """Whether no new requests are taken."""
        return self.stopping.is_set()

    @property
    def max_tokens(self) -> int:
        """Most tokens a request can come to hold, prompt included."""
        return self.engine.hello.max_model_len

    @property
    def refused(self) -> Mapping[str, int]:
        """Requests that were not taken, by reason."""
        return self.admission.refused

    @property
    def engine_restarts(self) -> int:
        """Engines started in a dead one's place."""
        return self.engine.restarts

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format, as it was at most 0.1 s ago."""
        now_s = self.metrics.clock()
        if now_s - self._exposed_s >= _EXPOSED_S:
            self._exposed_s, self._exposed = now_s, self._expose()
        return self._exposed

    def _expose(self) -> bytes:
        server = Server(
            model=self.model_name,
            startup_s=self.engine.hello.startup_s,
            refused=self.refused,
            engine_restarts=self.engine_restarts,
            loop_stalls=self.watchdog.num_stalls,
        )
        return self.metrics.exposition(server)

    def why_not(self) -> str | None:
        """Why no new request is taken, whatever it asks for."""
        if self.draining:
            return _DRAINING
        return self.engine.failure if self.engine.died.is_set() else None

    def enter(self) -> Ticket:
        """Admits an API call. Raises ApiError, which is counted, if it cannot be served now."""
        if self.draining:
            raise self._leaving()
        if self.engine.died.is_set():
            raise self._dead(self.engine.failure)
        if self.engine.is_behind:
            raise self.admission.refusal("queue_full", "the engine has not read what it was sent")
        return self.admission.enter()

    def _leaving(self) -> ApiError:
        error = self.admission.unavailable("draining", _DRAINING, 1.0)
        error.headers["Connection"] = "close"
        return error

    def _dead(self, failure: str) -> ApiError:
        return self.admission.unavailable("engine_down", failure, self.engine.retry_after_s)

    async def honest(self, pieces: AsyncGenerator[T]) -> AsyncGenerator[T]:
        """The pieces; what the engine did not even begin ends in a refusal, which is counted."""
        async with aclosing(pieces):
            try:
                async for piece in pieces:
                    yield piece
            except QueueTimeout as error:
                raise self.admission.refusal("queue_timeout", str(error)) from error
            except EngineDead as error:
                raise self._dead(str(error)) from error

    async def idle(self) -> None:
        """Returns when every API call has been answered."""
        while self.admission.num_calls:
            await asyncio.sleep(0.01)

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.model_name):
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here, only {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def encode(
        self, prompt: str | list[int], path: str, *, special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a prompt; `path` names it in errors."""
        if isinstance(prompt, str):
            limit = self.max_tokens
            text = prompt
            prompt = await _off_loop(
                len(text),
                path,
                lambda: self.tokenizer.encode(text, limit, special_tokens=special_tokens),
            )
        return self._check_tokens(prompt, path)

    async def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        size = sum(len(message["content"]) for message in messages)
        limit = self.max_tokens
        tokens = await _off_loop(
            size, "messages", lambda: self.tokenizer.encode_chat(messages, limit)
        )
        return self._check_tokens(tokens, "messages")

    def _check_tokens(self, tokens: list[int], path: str) -> list[int]:
        if not tokens:
            raise bad_request(f"{path} holds no tokens", path)
        if max(tokens) >= self.tokenizer.num_ids:
            raise bad_request(
                f"{path} holds token id {max(tokens)}; "
                f"the largest of this model is {self.tokenizer.num_ids - 1}",
                path,
            )
        return tokens

    def fit(self, num_prompt: int, max_tokens: int | None, path: str) -> int:
        """Output tokens to allow; as many as fit for None. Raises ApiError if it cannot fit."""
        room = self.max_tokens - num_prompt
        wanted = max(1, room) if max_tokens is None else max_tokens
        if wanted > room:
            raise _too_long(self.engine.hello, num_prompt, max_tokens, path)
        return wanted


async def _off_loop(size: int, path: str, work: Callable[[], list[int]]) -> list[int]:
    try:
        return work() if size < _LONG_TEXT else await asyncio.to_thread(work)
    except PromptTooLong as error:
        raise bad_request(str(error), path, _TOO_LONG) from error
    except TemplateError as error:
        raise bad_request(str(error), path) from error


def _too_long(hello: Hello, num_prompt: int, max_tokens: int | None, path: str) -> ApiError:
    output = "one of output" if max_tokens is None else f"max_tokens {max_tokens}"
    limit = f"the model's limit of {hello.max_model_len} tokens"
    total = f"the prompt's {num_prompt} tokens and {output}"
    return bad_request(f"{total} together exceed {limit}", path, _TOO_LONG)
