"""Holding, moving and freeing the rung over HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import fake_engine
import httpx
import pytest
from engine_thread import EngineThread

from morphserve.configs.schema import ServerConfig
from morphserve.runtime.engine_client import EngineClient
from morphserve.runtime.server.app import make_app
from morphserve.runtime.server.serving import Serving

pytestmark = pytest.mark.anyio
ADMIN = {"Authorization": "Bearer sk-admin"}
DEEPEST = len(fake_engine.HELLO.capacities) - 1


@pytest.fixture
async def admin(serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    config = ServerConfig("demo", api_keys=("sk-user",), admin_key="sk-admin")
    transport = httpx.ASGITransport(make_app(serving, config), raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=ADMIN
    ) as admin:
        yield admin


async def until_pinned(engine_thread: EngineThread, rung: int | None) -> None:
    async with asyncio.timeout(20):
        while engine_thread.engine.pinned != rung:
            await asyncio.sleep(0.005)


async def test_a_pin_reaches_the_engine_and_answers_the_target(
    admin: httpx.AsyncClient, engine_thread: EngineThread
) -> None:
    answer = await admin.post("/morph/v1/pin", json={"rung": 3})
    assert answer.json() == {"target_rung": 3, "pinned": True}
    await until_pinned(engine_thread, 3)
    assert (await admin.post("/morph/v1/free")).json()["pinned"] is False
    await until_pinned(engine_thread, None)


async def test_steps_add_up_before_the_engine_has_answered(
    admin: httpx.AsyncClient, client: EngineClient, engine_thread: EngineThread
) -> None:
    targets = []
    for by in (1, 1, -1):
        # One that was made before the pin can come long after it, when a step takes its time.
        client.snapshot = fake_engine.make_snapshot(time=time.time() + 1, target_rung=1)
        answer = await admin.post("/morph/v1/step", json={"by": by})
        targets.append(answer.json()["target_rung"])
    assert targets == [2, 3, 2]
    await until_pinned(engine_thread, 2)


async def test_a_step_starts_where_the_controller_has_gone(
    admin: httpx.AsyncClient, client: EngineClient
) -> None:
    await admin.post("/morph/v1/pin", json={"rung": 0})
    await admin.post("/morph/v1/free")
    client.snapshot = fake_engine.make_snapshot(time=time.time(), target_rung=3)
    answer = await admin.post("/morph/v1/step", json={"by": -1})
    assert answer.json() == {"target_rung": 2, "pinned": True}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/morph/v1/pin", {"rung": DEEPEST + 1}, "rung"),
        ("/morph/v1/pin", {"rung": -1}, "rung"),
        ("/morph/v1/pin", {"rung": "2"}, "rung"),
        ("/morph/v1/pin", {}, "rung"),
        ("/morph/v1/step", {"by": 2}, "by"),
        ("/morph/v1/step", {"by": 0}, "by"),
    ],
)
async def test_a_rung_that_is_not_there_is_a_400(
    admin: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    answer = await admin.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_the_range_is_named(admin: httpx.AsyncClient, client: EngineClient) -> None:
    answer = await admin.post("/morph/v1/pin", json={"rung": 99})
    assert f"there is no rung 99: this server has 0 to {DEEPEST}" in answer.text
    client.snapshot = fake_engine.make_snapshot(time=time.time(), target_rung=DEEPEST)
    assert "there is no rung 5" in (await admin.post("/morph/v1/step", json={"by": 1})).text


async def test_admin_routes_are_off_without_an_admin_key(api: httpx.AsyncClient) -> None:
    for path in ("/morph/v1/pin", "/morph/v1/step", "/morph/v1/free"):
        answer = await api.post(path, json={"rung": 1, "by": 1}, headers=ADMIN)
        assert answer.status_code == 403
        assert "start the server with --admin-key" in answer.text


async def test_an_api_key_is_not_the_admin_key(
    admin: httpx.AsyncClient, engine_thread: EngineThread
) -> None:
    for headers, status in (("Bearer sk-user", 403), ("Bearer x", 401), ("", 401)):
        answer = await admin.post(
            "/morph/v1/pin", json={"rung": 1}, headers={"Authorization": headers}
        )
        assert answer.status_code == status
    assert engine_thread.engine.pinned is None


async def test_too_many_admin_calls_are_told_to_wait(admin: httpx.AsyncClient) -> None:
    answers = [await admin.post("/morph/v1/free") for _ in range(100)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) > 50 and refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"


async def test_the_rung_can_be_moved_while_the_queue_is_full(
    admin: httpx.AsyncClient, serving: Serving
) -> None:
    admission = serving.admission
    tickets = [serving.enter() for _ in range(admission.max_requests)]
    assert (await admin.post("/v1/completions", json={"prompt": "a"})).status_code == 503
    assert (await admin.post("/morph/v1/pin", json={"rung": 4})).status_code == 200
    for ticket in tickets:
        admission.leave(ticket)


async def test_a_dead_engine_is_not_pinned(admin: httpx.AsyncClient, client: EngineClient) -> None:
    client.died.set()
    assert (await admin.post("/morph/v1/pin", json={"rung": 1})).status_code == 503
