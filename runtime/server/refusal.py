"""A refusal that reaches its client, whatever of the request has not been read."""

import asyncio
import contextlib

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

LINGER_S = 1.0  # for the rest of a refused body


class Refusal(Response):
    """Answers at once, then lets the client finish sending.

    Closing a connection with bytes unread resets it, and a reset takes the answer along.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start"} | start)
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        if not scope.get("state", {}).get("body_is_read"):
            await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    """What is left of the body."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass
