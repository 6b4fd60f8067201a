"""What all endpoints share, and the way from a request's fields to a job that fits."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from morphserve.runtime.engine_client import EngineClient
from morphserve.runtime.exposition import Server
from morphserve.runtime.messages import Hello
from morphserve.runtime.metrics import Metrics
from morphserve.runtime.request import Slo
from morphserve.runtime.server.errors import ApiError, bad_request, unavailable
from morphserve.runtime.tokenizer import PromptTooLong, TemplateError, Tokenizer

_TOO_LONG = "context_length_exceeded"
_LONG_TEXT = 4096  # characters; tokenising more would hold up other streams for milliseconds


@dataclass(slots=True)
class Ticket:
    """What one API call takes of the queue."""

    num_prompts: int = 1  # more once its body has been read


@dataclass(slots=True)
class Serving:
    """One served model."""

    engine: EngineClient
    tokenizer: Tokenizer
    metrics: Metrics
    model_name: str
    max_queued: int  # prompts in flight
    url: str = ""  # once it listens
    created: int = field(default_factory=lambda: int(time.time()))
    slo: Slo = Slo()  # that the server promises
    refused: Counter[str] = field(default_factory=Counter)  # requests not taken, by reason
    engine_restarts: int = 0
    draining: bool = False  # no new requests are taken
    num_active: int = 0  # API calls not yet answered to the end
    num_prompts: int = 0  # in flight

    @property
    def max_tokens(self) -> int:
        """Most tokens a request can come to hold, prompt included."""
        return self.engine.hello.max_model_len

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        startup_s = self.engine.hello.startup_s
        server = Server(self.model_name, startup_s, self.refused, self.engine_restarts)
        return self.metrics.exposition(server)

    def why_not(self) -> ApiError | None:
        """Why no new request is taken, whatever it asks for."""
        if self.engine.died.is_set():
            return unavailable(self.engine.failure)
        return unavailable("the server is shutting down") if self.draining else None

    def enter(self) -> Ticket:
        """Admits an API call. Raises ApiError (503) if the queue is full."""
        if self.num_prompts >= self.max_queued:
            raise self._full()
        self.num_active += 1
        self.num_prompts += 1
        return Ticket()

    def widen(self, ticket: Ticket, num_prompts: int) -> None:
        """Counts the prompts of a call. Raises ApiError if so many do not fit the queue."""
        if num_prompts > self.max_queued:
            raise bad_request(f"this server takes at most {self.max_queued} prompts", "prompt")
        more = num_prompts - ticket.num_prompts
        if self.num_prompts + more > self.max_queued:
            raise self._full()
        self.num_prompts += more
        ticket.num_prompts = num_prompts

    def leave(self, ticket: Ticket) -> None:
        """The call has been answered to the end."""
        self.num_active -= 1
        self.num_prompts -= ticket.num_prompts

    def _full(self) -> ApiError:
        return unavailable(
            f"the queue is full: {self.num_prompts} of {self.max_queued} prompts are in flight"
        )

    async def idle(self) -> None:
        """Returns when every API call has been answered."""
        while self.num_active:
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
