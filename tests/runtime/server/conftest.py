"""Fixtures of the server's tests: a fake engine behind the real socket."""

from collections.abc import AsyncIterator, Iterator
from importlib import resources
from pathlib import Path

import httpx
import pytest
from engine_thread import EngineThread, running_engine

from morphserve.configs.load import load_policy
from morphserve.configs.schema import EngineConfig
from morphserve.runtime.engine_client import EngineClient
from morphserve.runtime.metrics import Metrics
from morphserve.runtime.server.admission import Admission
from morphserve.runtime.server.app import make_app
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.tokenizer import Tokenizer

DEMO_MODEL = Path(str(resources.files("morphserve.morphcli").joinpath("demo_model")))
MAX_QUEUED = 80


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO_MODEL)


@pytest.fixture
def engine_config() -> EngineConfig:
    return EngineConfig(str(DEMO_MODEL), load_policy("balanced"))


@pytest.fixture
def engine_thread() -> Iterator[EngineThread]:
    with running_engine() as running:
        yield running


@pytest.fixture
async def client(
    engine_thread: EngineThread, engine_config: EngineConfig
) -> AsyncIterator[EngineClient]:
    client = EngineClient(engine_thread.sock)
    await client.start(engine_config)
    yield client
    await client.close()


@pytest.fixture
def serving(client: EngineClient, tokenizer: Tokenizer) -> Serving:
    return Serving(
        client, tokenizer, Metrics(lambda: client.snapshot), "demo", Admission(MAX_QUEUED, 10**6)
    )


@pytest.fixture
async def api(serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(serving), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as api:
        yield api
