"""Completions and chat completions, whole or streamed."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from morphserve.runtime.metrics import RequestTimer
from morphserve.runtime.server.demands import demands
from morphserve.runtime.server.endpoint import JSON
from morphserve.runtime.server.generation import Generator, Job, Piece, TextRules, whole
from morphserve.runtime.server.protocol import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    plain_messages,
)
from morphserve.runtime.server.replies import ChatReply, CompletionReply, Reply
from morphserve.runtime.server.responses import Usage
from morphserve.runtime.server.sampling import SamplingFields
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.server.streaming import DONE, EventStream, event, unless_disconnected


class Completions:
    """The endpoints that generate."""

    def __init__(self, serving: Serving, keep_alive_s: float) -> None:
        """`keep_alive_s`: silence on a stream before a comment is sent."""
        self._serving = serving
        self._keep_alive_s = keep_alive_s
        self._generator = Generator(serving.engine, serving.tokenizer)

    async def completions(self, request: Request, fields: CompletionRequest) -> Response:
        self._check(fields)
        given = fields.prompts()
        self._take_places(request, len(given) * fields.num_choices)
        special = fields.add_special_tokens is not False
        prompts = [
            await self._serving.encode(prompt, "prompt", special_tokens=special) for prompt in given
        ]
        limits = [self._serving.fit(len(prompt), fields.max_tokens, "prompt") for prompt in prompts]
        if fields.max_tokens is None:
            limits = [min(DEFAULT_MAX_TOKENS, room) for room in limits]
        job = self._job("cmpl", prompts, fields, limits, request)
        if fields.echo:
            job.echo = [self._read(prompt) for prompt in given]
        reply = CompletionReply(job.id, int(time.time()), self._serving.model_name)
        return await self._answer(request, fields, job, reply)

    async def chat(self, request: Request, fields: ChatRequest) -> Response:
        self._check(fields)
        self._take_places(request, fields.num_choices)
        prompt = await self._serving.encode_chat(plain_messages(fields.messages))
        max_tokens = self._serving.fit(len(prompt), fields.token_limit, "messages")
        job = self._job("chatcmpl", [prompt], fields, [max_tokens], request)
        told = prompt if job.tells_ids else UNSET
        reply = ChatReply(job.id, int(time.time()), self._serving.model_name, told)
        return await self._answer(request, fields, job, reply)

    def _take_places(self, request: Request, num_choices: int) -> None:
        self._serving.admission.widen(request.state.ticket, num_choices)

    def _read(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._serving.tokenizer.decode(prompt)

    def _check(self, fields: SamplingFields) -> None:
        self._serving.check_model(fields.model)
        fields.refuse_unsupported()

    def _job(
        self,
        prefix: str,
        prompts: list[list[int]],
        fields: SamplingFields,
        limits: Sequence[int],
        request: Request,
    ) -> Job:
        """`limits`: most output tokens of a choice, for each prompt."""
        num_ids = self._serving.tokenizer.num_ids
        received, num_choices = request.state.received, len(prompts) * fields.num_choices
        return Job(
            id=f"{prefix}-{uuid.uuid4().hex}",
            prompts=prompts,
            params=[fields.sampling(limit, num_ids) for limit in limits],
            rules=TextRules(
                fields.stops,
                include_stop=fields.include_stop_str_in_output is True,
                special_tokens=fields.skip_special_tokens is False,
            ),
            timers=[RequestTimer(self._serving.metrics, received) for _ in range(num_choices)],
            choices_per_prompt=fields.num_choices,
            tells_ids=fields.return_token_ids is True,
            demands=demands(request, fields.cache_salt),
        )

    async def _answer(
        self, request: Request, fields: SamplingFields, job: Job, reply: Reply
    ) -> Response:
        """Whole or streamed; the engine drops the job as soon as the client leaves."""
        admission, ticket = self._serving.admission, request.state.ticket
        admission.queue(ticket, [len(job.prompt_of(i)) for i in range(job.num_choices)])
        job.on_first_token = partial(admission.started, ticket)
        pieces = self._serving.honest(self._generator.run(job))
        if not fields.stream:
            body = await unless_disconnected(request.receive, _whole(pieces, job, reply))
            return _client_left() if body is None else Response(body, media_type=JSON)
        return EventStream(_events(pieces, job, reply, fields), self._keep_alive_s)


def _client_left() -> Response:
    return Response(status_code=499)  # nobody reads it


async def _whole(pieces: AsyncGenerator[Piece], job: Job, reply: Reply) -> bytes:
    return reply.whole(await whole(pieces, job.num_choices), job.usage())


async def _events(
    pieces: AsyncGenerator[Piece], job: Job, reply: Reply, fields: SamplingFields
) -> AsyncGenerator[bytes]:
    def usage() -> Usage | None:
        return job.usage() if fields.wants_usage_always else None

    async with aclosing(pieces):
        first = await anext(pieces)  # before anything is said, the engine has taken the request
        for chunk in reply.opening(job.num_choices, usage()):
            yield event(chunk)
        yield event(reply.chunk(first, usage()))
        async for piece in pieces:
            yield event(reply.chunk(piece, usage()))
        if fields.wants_usage:
            yield event(reply.closing(job.usage()))
        yield DONE
