"""The page at `/`: the server's state live in a browser, with nothing from elsewhere."""

import base64
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response


def _read(name: str) -> bytes:
    return Path(__file__).with_name(name).read_bytes()


def _headers(page: bytes) -> dict[str, str]:
    """Allows the page's own style and script alone; nothing may frame it, or send elsewhere."""
    style = page.partition(b"<style>")[2].partition(b"</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


_PAGE, _SCRIPT = _read("page.html"), _read("page.js")
_HEADERS = _headers(_PAGE)


async def page(_request: Request) -> Response:
    return Response(_PAGE, headers=_HEADERS, media_type="text/html")


async def script(_request: Request) -> Response:
    return Response(_SCRIPT, headers=_HEADERS, media_type="text/javascript")
