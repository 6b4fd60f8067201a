"""One endpoint as the table of routes has it: served, guarded and documented from that."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from morphserve.runtime.server.body import read_body

JSON = "application/json"
EVENTS = "text/event-stream"


class Access(Enum):
    """Which key an endpoint asks for, where the server has keys."""

    PUBLIC = "public"
    KEY = "key"  # an API key, or the admin key
    ADMIN = "admin"  # the admin key; without one the endpoint is off


@dataclass(frozen=True, slots=True)
class Header:
    """A header that an endpoint reads; `schema` is JSON Schema."""

    name: str
    schema: Mapping[str, Any]
    description: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method of one path.

    `run` gets the request and, where `takes` names a type, the body as that type.
    """

    method: str
    path: str
    run: Callable[..., Awaitable[Response]]
    tag: str
    summary: str
    access: Access = Access.KEY
    takes: Any = None  # type of the JSON body; None: no body is read
    answers: Any = None  # type of the JSON answer
    streams: Any = None  # type of a server-sent event's JSON
    media: str = JSON  # of the answer, where it is not JSON
    headers: Sequence[Header] = ()
    errors: Sequence[int] = ()  # statuses beside those that such an endpoint can always have

    def route(self) -> Route:
        if self.takes is None:
            return Route(self.path, self.run, methods=[self.method])
        decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(self.takes)

        async def run_with_body(request: Request) -> Response:
            return await self.run(request, await read_body(request, decoder))

        return Route(self.path, run_with_body, methods=[self.method])


def json_answer(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)
