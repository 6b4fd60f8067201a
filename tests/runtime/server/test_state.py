"""What a view learns from `/morph/v1/state`."""

import asyncio

import fake_engine
import httpx
import msgspec
import pytest

from morphserve.runtime.request import Slo
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.server.state import State, state_of

pytestmark = pytest.mark.anyio


async def state(api: httpx.AsyncClient) -> State:
    return msgspec.json.decode((await api.get("/morph/v1/state")).content, type=State)


async def test_what_a_view_needs_is_there(serving: Serving, api: httpx.AsyncClient) -> None:
    serving.url, serving.slo = "http://127.0.0.1:8000", Slo(ttft_s=0.5)
    serving.refused["queue_full"] += 3
    now = await state(api)
    assert (now.model, now.url, now.status) == ("demo", serving.url, "ready")
    assert now.uptime_s >= 0 and now.started == serving.created
    assert now.slo == Slo(ttft_s=0.5) and now.refused == {"queue_full": 3}
    assert now.prefix_hit_rate == 0.25
    assert now.ladder == fake_engine.HELLO.ladder and now.memory == fake_engine.HELLO.memory


async def test_a_finished_request_is_told_without_its_text(api: httpx.AsyncClient) -> None:
    body = {"prompt": "a secret prompt", "max_tokens": 4}
    reply = (await api.post("/v1/completions", json=body)).json()
    now = await state(api)
    (request,) = now.requests
    assert request.id.startswith(reply["id"])
    assert request.prompt_tokens == reply["usage"]["prompt_tokens"]
    assert sum(request.output_tokens.values()) == 4 and request.finish_reason == "length"
    assert request.ttft_s is not None and request.ttft_s <= request.e2e_s
    assert now.latency.e2e_s is not None
    assert "secret" not in (await api.get("/morph/v1/state")).text


async def test_a_server_that_drains_says_so(serving: Serving, api: httpx.AsyncClient) -> None:
    serving.stopping.set()
    assert (await state(api)).status == "draining"


async def test_a_dead_engine_is_told(serving: Serving) -> None:
    serving.engine.died.set()
    assert state_of(serving).status == "engine down"


async def test_all_watchers_see_the_same_rates(serving: Serving, api: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "max_tokens": 300}
    await api.post("/v1/completions", json=body)
    while serving.engine.snapshot.num_generated < 300:
        await asyncio.sleep(0.01)
    first, second = state_of(serving), state_of(serving)
    assert first.tokens_per_s == second.tokens_per_s
    assert first.tokens_per_s.generation > 0
