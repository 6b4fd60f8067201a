"""Completions and chat completions, whole or streamed."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from morphserve.runtime.metrics import RequestTimer
from morphserve.runtime.server.endpoint import JSON
from morphserve.runtime.server.generation import Generator, Job, Piece
from morphserve.runtime.server.protocol import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    plain_messages,
)
from morphserve.runtime.server.replies import ChatReply, CompletionReply, Reply
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
        self._serving.widen(request.state.ticket, len(given))
        prompts = [await self._serving.encode(prompt, "prompt") for prompt in given]
        wanted = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
        for prompt in prompts:
            self._serving.fit(len(prompt), wanted, "prompt")
        job = self._job("cmpl", prompts, fields, wanted, request)
        reply = CompletionReply(job.id, int(time.time()), self._serving.model_name)
        return await self._answer(request, fields, job, reply)

    async def chat(self, request: Request, fields: ChatRequest) -> Response:
        self._check(fields)
        prompt = await self._serving.encode_chat(plain_messages(fields.messages))
        max_tokens = self._serving.fit(len(prompt), fields.token_limit, "messages")
        job = self._job("chatcmpl", [prompt], fields, max_tokens, request)
        reply = ChatReply(job.id, int(time.time()), self._serving.model_name)
        return await self._answer(request, fields, job, reply)

    def _check(self, fields: SamplingFields) -> None:
        self._serving.check_model(fields.model)
        fields.refuse_unsupported()

    def _job(
        self,
        prefix: str,
        prompts: list[list[int]],
        fields: SamplingFields,
        max_tokens: int,
        request: Request,
    ) -> Job:
        received = request.state.received
        return Job(
            id=f"{prefix}-{uuid.uuid4().hex}",
            prompts=prompts,
            params=fields.sampling(max_tokens),
            stops=fields.stops,
            timers=[RequestTimer(self._serving.metrics, received) for _ in prompts],
        )

    async def _answer(
        self, request: Request, fields: SamplingFields, job: Job, reply: Reply
    ) -> Response:
        """Whole or streamed; the engine drops the job as soon as the client leaves."""
        pieces = self._generator.run(job)
        if not fields.stream:
            body = await unless_disconnected(request.receive, _whole(pieces, job, reply))
            return _client_left() if body is None else Response(body, media_type=JSON)
        return EventStream(_events(pieces, job, reply, fields.wants_usage), self._keep_alive_s)


def _client_left() -> Response:
    return Response(status_code=499)  # nobody reads it


async def _whole(pieces: AsyncGenerator[Piece], job: Job, reply: Reply) -> bytes:
    texts = [""] * len(job.prompts)
    reasons: list[str | None] = [None] * len(job.prompts)
    async with aclosing(pieces):
        async for piece in pieces:
            texts[piece.index] += piece.text
            reasons[piece.index] = piece.finish_reason
    choices = [Piece(i, *choice) for i, choice in enumerate(zip(texts, reasons, strict=True))]
    return reply.whole(choices, job.usage())


async def _events(
    pieces: AsyncGenerator[Piece], job: Job, reply: Reply, wants_usage: bool
) -> AsyncGenerator[bytes]:
    async with aclosing(pieces):
        first = await anext(pieces)  # before anything is said, the engine has taken the request
        for chunk in reply.opening():
            yield event(chunk)
        yield event(reply.chunk(first))
        async for piece in pieces:
            yield event(reply.chunk(piece))
        if wants_usage:
            yield event(reply.closing(job.usage()))
        yield DONE
