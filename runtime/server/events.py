"""What happens in the engine, as server-sent events."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from itertools import takewhile

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from morphserve.runtime.messages import Event
from morphserve.runtime.server.errors import bad_request
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.server.streaming import EventStream

LAST_EVENT_ID = "Last-Event-ID"
_LOOK_S = 0.5  # how long a stream may outlive the beginning of the server's end
_OPENING = b"retry: 1000\n\n"  # milliseconds before a browser asks again


class EventLog:
    """The endpoint that follows the engine's events.

    A reader takes from the events that are kept for all, at its own pace: one that is slow costs
    nothing more, and misses what has been dropped meanwhile. Ids count by one, so it can tell.
    """

    def __init__(self, serving: Serving, keep_alive_s: float) -> None:
        self._serving = serving
        self._keep_alive_s = keep_alive_s

    async def events(self, request: Request) -> Response:
        given = request.headers.get(LAST_EVENT_ID, "0")
        if not (given.isascii() and given.isdecimal() and len(given) < 20):
            raise bad_request(f"{LAST_EVENT_ID} must be the id of an event", LAST_EVENT_ID)
        return EventStream(self._follow(int(given)), self._keep_alive_s)

    async def _follow(self, last_id: int) -> AsyncGenerator[bytes]:
        """Events after that id which are kept, then new ones, until the server drains."""
        yield _OPENING
        engine = self._serving.engine
        while True:
            news = engine.news
            for event in _after(last_id, engine.events):
                last_id = event.id
                yield b"id: %d\ndata: %b\n\n" % (event.id, msgspec.json.encode(event))
            if self._serving.draining:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await news.wait()


def _after(last_id: int, kept: Sequence[Event]) -> list[Event]:
    """Of the events that are kept, oldest first, the newer ones."""
    if kept and last_id > kept[-1].id:
        last_id = 0  # from before this server's start
    return list(takewhile(lambda event: event.id > last_id, reversed(kept)))[::-1]
