"""Text to tokens and back, over HTTP."""

from starlette.requests import Request
from starlette.responses import Response

from morphserve.runtime.server.endpoint import json_answer
from morphserve.runtime.server.errors import bad_request
from morphserve.runtime.server.protocol import (
    DetokenizeRequest,
    TokenizeRequest,
    plain_messages,
)
from morphserve.runtime.server.responses import DetokenizeReply, Tokens
from morphserve.runtime.server.serving import Serving


class Texts:
    """The tokenizer's endpoints."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def tokenize(self, _request: Request, fields: TokenizeRequest) -> Response:
        self._serving.check_model(fields.model)
        tokens = await self._tokens_of(fields)
        limit = self._serving.engine.hello.max_model_len
        return json_answer(Tokens(tokens, len(tokens), limit))

    async def _tokens_of(self, fields: TokenizeRequest) -> list[int]:
        if fields.messages is not None:
            return await self._serving.encode_chat(plain_messages(fields.messages))
        if fields.prompt is None:
            raise bad_request("give either prompt or messages", "prompt")
        return await self._serving.encode(
            fields.prompt, "prompt", special_tokens=fields.add_special_tokens
        )

    async def detokenize(self, _request: Request, fields: DetokenizeRequest) -> Response:
        self._serving.check_model(fields.model)
        return json_answer(DetokenizeReply(self._serving.tokenizer.decode(fields.tokens)))
