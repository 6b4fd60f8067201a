"""An engine that dies is started again, until that is of no use."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import fake_engine
import pytest

from morphserve.configs.schema import CacheConfig, EngineConfig
from morphserve.runtime import supervisor
from morphserve.runtime.engine_client import EngineClient, EngineDead
from morphserve.runtime.request import FinishReason, SamplingParams
from morphserve.runtime.supervisor import MAX_DEATHS, Supervisor, backoff_s

COMMAND = (sys.executable, str(Path(fake_engine.__file__)))
DYING = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")

pytestmark = pytest.mark.anyio


async def finish(client: EngineClient, prompt: list[int]) -> FinishReason | None:
    params = SamplingParams(3)
    return [chunks async for chunks in client.generate("a", prompt, params)][-1][-1].finish_reason


async def crash(client: EngineClient) -> None:
    with pytest.raises(EngineDead):
        await finish(client, [fake_engine.CRASH])


def test_the_wait_before_a_start_doubles_up_to_half_a_minute() -> None:
    assert [backoff_s(n) for n in range(1, 10)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]


async def test_the_same_client_speaks_to_the_next_engine(engine_config: EngineConfig) -> None:
    watched = Supervisor(engine_config, 60.0, COMMAND)
    await watched.start()
    running = asyncio.create_task(watched.run())
    client = watched.client
    await crash(client)
    assert client.died.is_set() and client.snapshot.blocks_used == 0
    while client.died.is_set():
        await asyncio.sleep(0.005)
    assert await finish(client, [5]) is FinishReason.LENGTH
    assert client.restarts == 1
    running.cancel()
    await watched.close()


async def test_a_pin_outlives_the_engine(engine_config: EngineConfig) -> None:
    watched = Supervisor(engine_config, 60.0, COMMAND)
    await watched.start()
    running = asyncio.create_task(watched.run())
    client = watched.client
    client.pin(3)
    await crash(client)
    while not (client.restarts and client.events and client.events[-1].kind == "pin"):
        await asyncio.sleep(0.005)
    assert client.events[-1].text == "rung 3"
    running.cancel()
    await watched.close()


async def test_an_engine_that_says_why_it_cannot_start_is_not_tried_again(
    engine_config: EngineConfig,
) -> None:
    watched = Supervisor(engine_config, 60.0, COMMAND)
    await watched.start()
    watched._config = replace(engine_config, cache=CacheConfig(memory_budget=1))
    await crash(watched.client)
    await watched.run()
    assert "at least 42 MiB are needed" in watched.client.failure
    await watched.close()


async def test_engines_that_die_while_they_load_are_given_up(
    engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.001)
    watched = Supervisor(engine_config, 60.0, COMMAND)
    await watched.start()
    watched._command = DYING
    await crash(watched.client)
    await watched.run()
    assert "was killed by signal 9" in watched.client.failure
    told = [event.text for event in watched.client.events if event.kind == "engine"]
    assert len(told) == MAX_DEATHS
    await watched.close()


async def test_a_death_after_a_minute_of_service_is_the_first_again(
    engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "GOOD_SERVICE_S", 0.0)
    watched = Supervisor(engine_config, 60.0, COMMAND)
    await watched.start()
    running = asyncio.create_task(watched.run())
    for count in range(1, MAX_DEATHS + 2):
        await crash(watched.client)
        while watched.client.restarts < count:
            await asyncio.sleep(0.005)
    assert not running.done()
    running.cancel()
    await watched.close()


async def test_closing_during_a_start_leaves_no_process(engine_config: EngineConfig) -> None:
    watched = Supervisor(engine_config, 60.0, (sys.executable, "-c", "import time; time.sleep(99)"))
    starting = asyncio.create_task(watched.start())
    await asyncio.sleep(0.05)
    starting.cancel()
    await watched.close()
    assert watched._process.process.poll() is not None
