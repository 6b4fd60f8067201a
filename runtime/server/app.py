"""The HTTP API: which paths there are and what each answers."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from importlib.metadata import version

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from morphserve.configs.errors import MorphError
from morphserve.runtime.metrics import RequestTimer
from morphserve.runtime.server.body import read_body
from morphserve.runtime.server.demands import demands
from morphserve.runtime.server.errors import (
    ApiError,
    bad_request,
    on_crash,
    on_http_error,
    on_known_error,
    unavailable,
)
from morphserve.runtime.server.generation import Generator, Job, Piece, TextRules, joined
from morphserve.runtime.server.middleware import Gate, RequestIds
from morphserve.runtime.server.page import page, script
from morphserve.runtime.server.protocol import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    plain_messages,
)
from morphserve.runtime.server.replies import ChatReply, CompletionReply, Reply
from morphserve.runtime.server.responses import (
    DetokenizeReply,
    Model,
    ModelList,
    Tokens,
    Usage,
    encode,
)
from morphserve.runtime.server.sampling import SamplingFields
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.server.state import state_of
from morphserve.runtime.server.streaming import DONE, EventStream, event, unless_disconnected

_COMPLETION = msgspec.json.Decoder(CompletionRequest)
_CHAT = msgspec.json.Decoder(ChatRequest)
_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def make_app(serving: Serving) -> Starlette:
    """The ASGI application for one served model."""
    api = Api(serving)
    app = Starlette(
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/tokenize", api.tokenize, methods=["POST"]),
            Route("/detokenize", api.detokenize, methods=["POST"]),
            Route("/health", api.health),
            Route("/ready", api.ready),
            Route("/metrics", api.metrics),
            Route("/version", api.version),
            Route("/morph/v1/state", api.state),
            Route("/", page),
            Route("/page.js", script),
        ],
        middleware=[Middleware(RequestIds), Middleware(Gate, serving=serving)],
        exception_handlers={
            ApiError: on_known_error,
            MorphError: on_known_error,
            HTTPException: on_http_error,
            Exception: on_crash,
        },
    )
    app.router.redirect_slashes = False  # a redirect would lose the body; 404 says what is wrong
    return app


class Api:
    """The endpoints."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._generator = Generator(serving.engine, serving.tokenizer)

    async def completions(self, request: Request) -> Response:
        received = self._serving.metrics.clock()
        fields = await read_body(request, _COMPLETION)
        self._check(fields)
        given = fields.prompts()
        num_choices = len(given) * fields.num_choices
        self._serving.admission.widen(request.state.ticket, num_choices)
        special = fields.add_special_tokens is not False
        prompts = [
            await self._serving.encode(prompt, "prompt", special_tokens=special) for prompt in given
        ]
        wanted = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
        for prompt in prompts:
            self._serving.fit(len(prompt), wanted, "prompt")
        job = self._job("cmpl", prompts, fields, wanted, request, received)
        if fields.echo:
            job.echo = [self._read(prompt) for prompt in given]
        reply = CompletionReply(job.id, int(time.time()), self._serving.model_name)
        return await self._answer(request, fields, job, reply)

    async def chat(self, request: Request) -> Response:
        received = self._serving.metrics.clock()
        fields = await read_body(request, _CHAT)
        self._check(fields)
        self._serving.admission.widen(request.state.ticket, fields.num_choices)
        prompt = await self._serving.encode_chat(plain_messages(fields.messages))
        max_tokens = self._serving.fit(len(prompt), fields.token_limit, "messages")
        job = self._job("chatcmpl", [prompt], fields, max_tokens, request, received)
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
        received: float,
    ) -> Job:
        num_choices = len(prompts) * fields.num_choices
        return Job(
            id=f"{prefix}-{uuid.uuid4().hex}",
            prompts=prompts,
            params=fields.sampling(max_tokens, self._serving.tokenizer.num_ids),
            rules=TextRules(
                fields.stops,
                include_stop=fields.include_stop_str_in_output is True,
                special_tokens=fields.skip_special_tokens is False,
            ),
            timers=[RequestTimer(self._serving.metrics, received) for _ in range(num_choices)],
            choices_per_prompt=fields.num_choices,
            demands=demands(request, fields.cache_salt),
        )

    def _read(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._serving.tokenizer.decode(prompt)

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
            return _client_left() if body is None else _json(body)
        # The status is sent only when the engine has taken the request.
        first = await unless_disconnected(request.receive, _first(pieces))
        if first is None:
            return _client_left()
        return EventStream(_events(first, pieces, job, reply, fields))

    async def models(self, _request: Request) -> Response:
        return _json(encode(ModelList([self._model()])))

    async def model(self, request: Request) -> Response:
        self._serving.check_model(request.path_params["name"])
        return _json(encode(self._model()))

    def _model(self) -> Model:
        serving = self._serving
        return Model(serving.model_name, serving.created, serving.engine.hello.max_model_len)

    async def tokenize(self, request: Request) -> Response:
        fields = await read_body(request, _TOKENIZE)
        self._serving.check_model(fields.model)
        tokens = await self._tokens_of(fields)
        limit = self._serving.engine.hello.max_model_len
        return _json(encode(Tokens(tokens, len(tokens), limit)))

    async def _tokens_of(self, fields: TokenizeRequest) -> list[int]:
        if fields.messages is not None:
            return await self._serving.encode_chat(plain_messages(fields.messages))
        if fields.prompt is None:
            raise bad_request("give either prompt or messages", "prompt")
        return await self._serving.encode(
            fields.prompt, "prompt", special_tokens=fields.add_special_tokens
        )

    async def detokenize(self, request: Request) -> Response:
        fields = await read_body(request, _DETOKENIZE)
        self._serving.check_model(fields.model)
        return _json(encode(DetokenizeReply(self._serving.tokenizer.decode(fields.tokens))))

    async def health(self, _request: Request) -> Response:
        engine = self._serving.engine
        if engine.died.is_set():
            raise unavailable(engine.failure, engine.retry_after_s)
        return _json(b'{"status":"ok"}')

    async def ready(self, _request: Request) -> Response:
        if reason := self._serving.why_not():
            raise unavailable(reason, self._serving.engine.retry_after_s)
        return _json(b'{"status":"ready"}')

    async def metrics(self, _request: Request) -> Response:
        return Response(self._serving.exposition(), media_type=_PROMETHEUS)

    async def version(self, _request: Request) -> Response:
        return _json(encode({"version": version("morphserve")}))

    async def state(self, _request: Request) -> Response:
        return _json(encode(state_of(self._serving)))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _client_left() -> Response:
    return Response(status_code=499)  # nobody reads it


async def _first(pieces: AsyncGenerator[Piece]) -> Piece:
    return await anext(pieces)


async def _whole(pieces: AsyncGenerator[Piece], job: Job, reply: Reply) -> bytes:
    return reply.whole(await joined(pieces, job.num_choices), job.usage())


async def _events(
    first: Piece,
    pieces: AsyncGenerator[Piece],
    job: Job,
    reply: Reply,
    fields: SamplingFields,
) -> AsyncGenerator[bytes]:
    def usage() -> Usage | None:
        return job.usage() if fields.wants_usage_always else None

    async with aclosing(pieces):
        for chunk in reply.opening(job.num_choices, usage()):
            yield event(chunk)
        yield event(reply.chunk(first, usage()))
        async for piece in pieces:
            yield event(reply.chunk(piece, usage()))
        if fields.wants_usage:
            yield event(reply.closing(job.usage()))
        yield DONE
