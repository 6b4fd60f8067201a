"""The HTTP API put together: the table of routes behind what guards it."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from morphserve.configs.errors import MorphError
from morphserve.runtime.server.errors import ApiError, on_crash, on_http_error, on_known_error
from morphserve.runtime.server.middleware import Gate, RequestIds
from morphserve.runtime.server.routes import endpoints
from morphserve.runtime.server.serving import Serving


def make_app(serving: Serving) -> Starlette:
    """The ASGI application for one served model."""
    app = Starlette(
        routes=[endpoint.route() for endpoint in endpoints(serving)],
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
