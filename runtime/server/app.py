"""The HTTP API put together: the table of routes behind what guards it."""

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from morphserve.configs.errors import MorphError
from morphserve.configs.schema import ServerConfig
from morphserve.runtime.server.endpoint import Access, Endpoint
from morphserve.runtime.server.errors import ApiError, on_crash, on_http_error, on_known_error
from morphserve.runtime.server.keys import KeyCheck, Keys
from morphserve.runtime.server.middleware import Gate, RequestIds
from morphserve.runtime.server.origins import Origins, normal_origin
from morphserve.runtime.server.routes import endpoints
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.server.turned_away import TurnedAway


def make_app(
    serving: Serving, server: ServerConfig | None = None, *, on_loopback: bool = False
) -> Starlette:
    """The ASGI application for one served model.

    `server` gives keys, origins and times (None: the defaults), `on_loopback` says that only this
    machine can connect.
    """
    server = server or ServerConfig(serving.model_name)
    table = endpoints(serving, server.sse_keep_alive_s, keys_wanted=bool(server.api_keys))
    app = Starlette(
        routes=[endpoint.route() for endpoint in table],
        middleware=_guards(serving, server, table, on_loopback),
        exception_handlers={
            ApiError: on_known_error,
            MorphError: on_known_error,
            HTTPException: on_http_error,
            Exception: on_crash,
        },
    )
    app.router.redirect_slashes = False  # a redirect would lose the body; 404 says what is wrong
    return app


def _guards(
    serving: Serving, server: ServerConfig, table: Sequence[Endpoint], on_loopback: bool
) -> list[Middleware]:
    """In the order in which a request meets them."""
    turned_away = TurnedAway(serving.admission.refused)
    keys = Keys(server.api_keys, server.admin_key)
    access = {endpoint.path: endpoint.access for endpoint in table}
    counted = frozenset(e.path for e in table if e.takes and e.access is not Access.ADMIN)
    origins = [normal_origin(origin) for origin in server.allowed_origins]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )
    return [
        Middleware(RequestIds),
        Middleware(
            Origins,
            allowed=origins,
            host=server.host,
            on_loopback=on_loopback,
            turned_away=turned_away,
        ),
        *([cors] if origins else []),
        Middleware(KeyCheck, keys=keys, access=access, turned_away=turned_away),
        Middleware(Gate, serving=serving, counted=counted),
    ]
