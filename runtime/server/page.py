"""The page at `/`: the server's state live in a browser, with nothing from elsewhere."""

from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

# Of the style, only what stands in the page itself; nothing may frame it, send or load elsewhere.
_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(_request: Request) -> Response:
    return Response(_read("page.html"), headers=_HEADERS, media_type="text/html")


async def script(_request: Request) -> Response:
    return Response(_read("page.js"), headers=_HEADERS, media_type="text/javascript")


@cache
def _read(name: str) -> bytes:
    return Path(__file__).with_name(name).read_bytes()
