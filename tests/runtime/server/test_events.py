"""The stream of the engine's events."""

import asyncio
import json

import httpx
import pytest
from engine_thread import EngineThread

from morphserve.runtime.engine_client import KEPT_EVENTS, EngineClient
from morphserve.runtime.messages import Event
from morphserve.runtime.server.serving import Serving

pytestmark = pytest.mark.anyio


async def happen(engine_thread: EngineThread, client: EngineClient, *ids: int) -> None:
    """Events with these ids happen in the engine, and have arrived."""
    engine_thread.engine.events += [Event(i, 1.0, "demote", f"event {i}") for i in ids]
    async with asyncio.timeout(20):
        while not client.events or client.events[-1].id != ids[-1]:
            await asyncio.sleep(0.005)


async def ids_of(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    opening, *events, end = answer.text.split("\n\n")
    assert opening == "retry: 1000" and end == ""
    ids = []
    for event in events:
        id_line, data_line = event.split("\n")
        ids.append(int(id_line.removeprefix("id: ")))
        assert json.loads(data_line.removeprefix("data: "))["id"] == ids[-1]
    return ids


async def test_what_is_kept_comes_first_then_what_happens_and_draining_ends_it(
    api: httpx.AsyncClient, serving: Serving, client: EngineClient, engine_thread: EngineThread
) -> None:
    await happen(engine_thread, client, 2, 3)
    answer = asyncio.create_task(api.get("/morph/v1/events"))
    await asyncio.sleep(0.05)
    await happen(engine_thread, client, 4)
    await happen(engine_thread, client, 5, 6)
    serving.stopping.set()
    assert await ids_of(await answer) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("last", "ids"), [("0", [1, 2, 3]), ("2", [3]), ("3", []), ("77", [1, 2, 3])]
)
async def test_a_reader_resumes_after_the_last_event_it_has_seen(
    api: httpx.AsyncClient,
    serving: Serving,
    client: EngineClient,
    engine_thread: EngineThread,
    last: str,
    ids: list[int],
) -> None:
    await happen(engine_thread, client, 2, 3)
    serving.stopping.set()
    answer = await api.get("/morph/v1/events", headers={"Last-Event-ID": last})
    assert await ids_of(answer) == ids


async def test_what_has_been_dropped_is_missing_and_the_ids_tell(
    api: httpx.AsyncClient, serving: Serving, client: EngineClient, engine_thread: EngineThread
) -> None:
    await happen(engine_thread, client, *range(2, KEPT_EVENTS + 11))
    serving.stopping.set()
    answer = await api.get("/morph/v1/events", headers={"Last-Event-ID": "5"})
    assert await ids_of(answer) == list(range(11, KEPT_EVENTS + 11))


@pytest.mark.parametrize("last", ["-1", "x", "1.5", "9" * 30, "²"])
async def test_an_id_that_is_none_is_a_400(api: httpx.AsyncClient, last: str) -> None:
    headers = {"Last-Event-ID": last.encode()}
    answer = await api.get("/morph/v1/events", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Last-Event-ID"
