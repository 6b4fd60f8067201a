"""Who may come in, who is refused, and that both are counted."""

import asyncio

import fake_engine
import httpx
import pytest
from engine_thread import EngineThread

from morphserve.runtime.engine_client import EngineClient
from morphserve.runtime.server.admission import Admission
from morphserve.runtime.server.errors import ApiError
from morphserve.runtime.server.serving import Serving


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_places_are_taken_at_once_and_given_back_once() -> None:
    admission = Admission(2, 1000)
    first, second = admission.enter(), admission.enter()
    with pytest.raises(ApiError, match="2 of 2 prompts are in flight") as caught:
        admission.enter()
    assert caught.value.status == 503
    admission.leave(first)
    admission.widen(second, 2)
    with pytest.raises(ApiError):
        admission.enter()
    admission.leave(second)
    assert (admission.num_calls, admission.num_prompts) == (0, 0)
    assert admission.refused == {"queue_full": 2}


def test_tokens_are_queued_until_the_first_token_of_their_choice() -> None:
    admission = Admission(10, 100)
    ticket, other = admission.enter(), admission.enter()
    admission.queue(ticket, [60, 30])
    with pytest.raises(ApiError, match="90 of 100 prompt tokens are waiting"):
        admission.queue(other, [11])
    admission.started(ticket, 0)
    admission.started(ticket, 0)
    assert admission.queued_tokens == 30
    admission.queue(other, [11])
    admission.leave(ticket)
    assert admission.queued_tokens == 11
    admission.leave(other)
    assert admission.queued_tokens == 0 and admission.refused == {"queued_tokens": 1}


def test_an_idle_server_takes_what_is_longer_than_the_queue() -> None:
    admission = Admission(10, 100)
    admission.queue(admission.enter(), [500])
    assert admission.queued_tokens == 500


def test_retry_after_is_the_backlog_at_the_recent_rate() -> None:
    clock = Clock()
    admission = Admission(1, 10_000, clock=clock)
    ticket = admission.enter()
    admission.queue(ticket, [200, 900])
    with pytest.raises(ApiError) as caught:
        admission.enter()
    assert caught.value.headers == {"Retry-After": "1"}  # nothing is known yet
    admission.started(ticket, 0)
    clock.now = 2.0  # 200 tokens in two seconds
    with pytest.raises(ApiError) as caught:
        admission.enter()
    assert caught.value.headers == {"Retry-After": "9"}
    clock.now = 9.9
    with pytest.raises(ApiError) as caught:
        admission.enter()
    assert caught.value.headers == {"Retry-After": "45"}


def test_retry_after_is_a_minute_at_most() -> None:
    clock = Clock()
    admission = Admission(1, 10**9, clock=clock)
    ticket = admission.enter()
    admission.queue(ticket, [1, 10**8])
    admission.started(ticket, 0)
    with pytest.raises(ApiError) as caught:
        admission.enter()
    assert caught.value.headers == {"Retry-After": "60"}


@pytest.mark.anyio
async def test_too_much_can_be_429(serving: Serving, api: httpx.AsyncClient) -> None:
    serving.admission = Admission(0, 1000, status=429)
    answer = await api.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "service_unavailable_error"
    assert serving.refused == {"queue_full": 1}


@pytest.mark.anyio
async def test_queued_tokens_are_refused_before_a_status_is_sent(
    serving: Serving, api: httpx.AsyncClient, client: EngineClient
) -> None:
    serving.admission.max_queued_tokens = 10
    silent = {"prompt": [fake_engine.MUTE] * 8, "max_tokens": 3}
    waiting = asyncio.create_task(api.post("/v1/completions", json=silent))
    while not client.num_requests:
        await asyncio.sleep(0.001)
    answer = await api.post("/v1/completions", json={"prompt": [5] * 3, "stream": True})
    assert answer.status_code == 503 and "retry-after" in answer.headers
    assert "8 of 10 prompt tokens are waiting, and this request has 3" in answer.text
    client.abort_all()
    await waiting
    assert serving.admission.queued_tokens == 0
    state = (await api.get("/morph/v1/state")).json()
    assert state["refused"] == {"queued_tokens": 1}
    metrics = (await api.get("/metrics")).text
    assert "morph:kv_blocks_used" in metrics


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_waited_too_long_is_told_so(
    serving: Serving,
    api: httpx.AsyncClient,
    client: EngineClient,
    engine_thread: EngineThread,
    stream: bool,
) -> None:
    silent = {"prompt": [fake_engine.MUTE], "max_tokens": 3, "stream": stream}
    waiting = asyncio.create_task(api.post("/v1/completions", json=silent))
    while not engine_thread.engine.requests:
        await asyncio.sleep(0.001)
    engine_thread.engine.time_out = True
    answer = await waiting
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert "s in the queue" in answer.json()["error"]["message"]
    assert serving.refused == {"queue_timeout": 1}
    assert serving.admission.num_prompts == client.num_requests == 0
