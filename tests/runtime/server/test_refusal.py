"""A refusal is sent at once, and its connection kept while a body is on its way."""

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import Message

from morphserve.runtime.server.body import read_body
from morphserve.runtime.server.refusal import Refusal


class Connection:
    """A client that sends these parts of a body and then waits."""

    def __init__(self, *parts: bytes) -> None:
        self.coming = list(parts)
        self.sent: list[Message] = []
        self.scope: dict[str, Any] = {"type": "http", "method": "POST", "headers": [], "state": {}}

    async def receive(self) -> Message:
        assert self.coming, "nobody sends more"
        part = self.coming.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self.coming)}

    async def send(self, message: Message) -> None:
        self.sent.append(message | {"unread": len(self.coming)})


def test_the_answer_comes_first_and_the_end_after_the_body() -> None:
    client = Connection(b" " * 10, b" " * 10, b"")
    asyncio.run(Refusal(b"full", 503)(client.scope, client.receive, client.send))
    assert [(m.get("body"), m["unread"]) for m in client.sent] == [
        (None, 3),
        (b"full", 3),
        (b"", 0),
    ]


def test_a_body_that_has_been_read_is_not_waited_for() -> None:
    client = Connection(b"{", b"}")

    async def refuse() -> None:
        await read_body(Request(client.scope, client.receive), msgspec.json.Decoder(dict))
        await Refusal(b"wrong", 400)(client.scope, client.receive, client.send)

    asyncio.run(refuse())
    assert client.sent[-1]["more_body"] is False
