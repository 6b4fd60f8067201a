"""What an administrator does to the rung: hold it, move it, leave it to the controller."""

from typing import Annotated, Literal

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from morphserve.runtime.server.endpoint import json_answer
from morphserve.runtime.server.errors import bad_request, unavailable
from morphserve.runtime.server.serving import Serving


class PinRequest(Struct):
    rung: Annotated[
        int,
        Meta(
            ge=0,
            le=2**31 - 1,
            description="Steps of the ladder to hold; 0 is full precision. "
            "The deepest is one less than the number of capacities in the state.",
        ),
    ]


class StepRequest(Struct):
    by: Annotated[
        Literal[1, -1],
        Meta(description="1: one layer deeper; -1: one back towards full precision."),
    ]


class Target(Struct):
    """Where the rung is going. Swaps on the way take a while; the state shows them."""

    target_rung: int
    pinned: bool  # until it is freed; else the controller decides


class Admin:
    """The endpoints that need the admin key."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def pin(self, _request: Request, fields: PinRequest) -> Response:
        return self._pin(fields.rung, "rung")

    async def step(self, _request: Request, fields: StepRequest) -> Response:
        engine = self._serving.engine
        # The pin itself, not a snapshot: two steps may come before one that shows the first.
        now = engine.snapshot.target_rung if engine.held_rung is None else engine.held_rung
        return self._pin(now + fields.by, "by")

    async def free(self, _request: Request) -> Response:
        self._check_engine()
        self._serving.engine.pin(None)
        return json_answer(Target(self._serving.engine.snapshot.target_rung, pinned=False))

    def _pin(self, rung: int, field: str) -> Response:
        self._check_engine()
        deepest = len(self._serving.engine.hello.capacities) - 1
        if not 0 <= rung <= deepest:
            raise bad_request(f"there is no rung {rung}: this server has 0 to {deepest}", field)
        self._serving.engine.pin(rung)
        return json_answer(Target(rung, pinned=True))

    def _check_engine(self) -> None:
        engine = self._serving.engine
        if engine.died.is_set():
            raise unavailable(engine.failure, engine.retry_after_s)
