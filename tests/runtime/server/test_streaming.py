"""Streams that are silent for a while."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import fake_engine
import httpx
import pytest

from morphserve.configs.schema import ServerConfig
from morphserve.runtime.engine_client import EngineClient
from morphserve.runtime.server.app import make_app
from morphserve.runtime.server.errors import ApiError, unavailable
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.server.streaming import EventStream, event

pytestmark = pytest.mark.anyio
COMMENT = ": keep-alive\n\n"


@pytest.fixture
async def impatient(serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    """A server that speaks up after 20 ms of silence."""
    app = make_app(serving, ServerConfig("demo", sse_keep_alive_s=0.02))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as api:
        yield api


async def sent_by(stream: EventStream) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(dict(message))

    await stream({"type": "http"}, receive, send)
    return sent


def text_of(sent: list[dict[str, Any]]) -> str:
    assert [message["type"] for message in sent].count("http.response.start") == 1
    return b"".join(message.get("body", b"") for message in sent).decode()


async def test_silence_is_filled_with_comments_between_whole_events() -> None:
    spoken = asyncio.Event()

    async def events() -> AsyncGenerator[bytes]:
        yield event(b"1")
        await spoken.wait()
        yield event(b"2")

    stream = EventStream(events(), 0.01)
    asyncio.get_running_loop().call_later(0.2, spoken.set)
    text = text_of(await sent_by(stream))
    assert text.startswith("data: 1\n\n" + COMMENT) and text.endswith(COMMENT + "data: 2\n\n")


async def test_events_that_come_in_time_have_no_comments_between_them() -> None:
    async def events() -> AsyncGenerator[bytes]:
        for _ in range(100):
            await asyncio.sleep(0)
            yield event(b"x")

    assert text_of(await sent_by(EventStream(events(), 1000.0))) == "data: x\n\n" * 100


async def test_a_refusal_before_the_first_comment_keeps_its_status() -> None:
    async def events() -> AsyncGenerator[bytes]:
        raise unavailable("full")
        yield b""

    with pytest.raises(ApiError, match="full"):
        await sent_by(EventStream(events(), 1000.0))


async def test_a_refusal_after_the_first_comment_is_an_event() -> None:
    async def events() -> AsyncGenerator[bytes]:
        await asyncio.sleep(0.1)
        raise unavailable("full")
        yield b""

    text = text_of(await sent_by(EventStream(events(), 0.01)))
    comments, _, error = text.partition("data: ")
    assert set(comments.split("\n\n")) == {": keep-alive", ""}
    assert '"message":"full"' in error


async def test_a_request_that_waits_for_its_first_token_is_told_that_it_lives(
    impatient: httpx.AsyncClient, client: EngineClient
) -> None:
    body = {"prompt": [fake_engine.MUTE], "max_tokens": 5, "stream": True}
    asyncio.get_running_loop().call_later(0.3, client.abort_all)
    answer = await impatient.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.text.startswith(COMMENT)
    assert "data: [DONE]" not in answer.text and '"error"' in answer.text
