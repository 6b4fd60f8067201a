"""Responses that notice when the client leaves, and server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from morphserve.configs.errors import MorphError
from morphserve.runtime.server.errors import ApiError, as_api_error

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

T = TypeVar("T")


def event(body: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + body + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None, with the work cancelled, if the client leaves first."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come; stops their source as soon as the client has left.

    Whatever the source raises before its first event is raised here, to be answered with a status.
    But a client that has waited `keep_alive_s` for it gets 200 and a comment, and another after
    each such silence: proxies and clients give up on what looks dead. From then on an error is an
    event, as it is after the first event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], keep_alive_s: float) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._started = False
        self._sending = asyncio.Lock()  # events and comments go out whole, after the status
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        breathing = asyncio.create_task(self._keep_alive(send))
        try:
            async with aclosing(self._events):
                async for data in self._events:
                    await self._send(send, data)
        except (ApiError, MorphError) as error:
            if not self._started:
                raise
            await self._send(send, event(as_api_error(error).body()))
        finally:
            breathing.cancel()
            await asyncio.gather(breathing, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        self._sent_at = clock()
        while True:
            silence_s = clock() - self._sent_at
            if silence_s >= self._keep_alive_s:
                await self._send(send, KEEP_ALIVE)
            else:
                await asyncio.sleep(self._keep_alive_s - silence_s)

    async def _send(self, send: Send, data: bytes) -> None:
        async with self._sending:
            if not self._started:
                self._started = True
                start = {"type": "http.response.start", "status": 200}
                await send({**start, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._sent_at = asyncio.get_running_loop().time()
