"""What a server says of itself: its model, its health, its numbers, its state."""

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from morphserve.configs.version import version
from morphserve.runtime.server.endpoint import json_answer
from morphserve.runtime.server.errors import unavailable
from morphserve.runtime.server.responses import Model, ModelList
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.server.state import state_of

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Health(msgspec.Struct):
    status: Literal["ok"] = "ok"


class Ready(msgspec.Struct):
    status: Literal["ready"] = "ready"


class Version(msgspec.Struct):
    version: str


class About:
    """The endpoints that only look."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def models(self, _request: Request) -> Response:
        return json_answer(ModelList([self._model()]))

    async def model(self, request: Request) -> Response:
        self._serving.check_model(request.path_params["name"])
        return json_answer(self._model())

    def _model(self) -> Model:
        serving = self._serving
        return Model(serving.model_name, serving.created, serving.engine.hello.max_model_len)

    async def health(self, _request: Request) -> Response:
        engine = self._serving.engine
        if engine.died.is_set():
            raise unavailable(engine.failure, engine.retry_after_s)
        return json_answer(Health())

    async def ready(self, _request: Request) -> Response:
        if reason := self._serving.why_not():
            raise unavailable(reason, self._serving.engine.retry_after_s)
        return json_answer(Ready())

    async def metrics(self, _request: Request) -> Response:
        return Response(self._serving.exposition(), media_type=PROMETHEUS)

    async def version(self, _request: Request) -> Response:
        return json_answer(Version(version()))

    async def state(self, _request: Request) -> Response:
        return json_answer(state_of(self._serving))
