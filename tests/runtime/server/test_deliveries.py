"""How tokens are handed on: the first and the last at once, those between at a pace."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import fake_engine
import httpx
import pytest
import uvloop
from engine_thread import EngineThread
from hypothesis import given, settings
from hypothesis import strategies as st

from morphserve.quantize.manifest import Variant
from morphserve.runtime import deliveries
from morphserve.runtime.deliveries import Chunk, Deliveries, Mailbox
from morphserve.runtime.engine_client import EngineClient
from morphserve.runtime.messages import Step, TokenOutput
from morphserve.runtime.request import FinishReason

pytestmark = pytest.mark.anyio

NO_PACE, SLOW_PACE = 10**9, 1e-9  # pieces per second


def step(token: int, *names: str, end: str | None = None) -> Step:
    return Step(Variant.FULL, [TokenOutput(name, [token], end) for name in names])


def tokens(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


async def is_asleep(box: Mailbox) -> bool:
    """Whether nothing is due; what is due gets lost."""
    with suppress(TimeoutError):
        async with asyncio.timeout(0.01):
            await box.take()
            return False
    return True


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rest that no test outlives."""
    monkeypatch.setattr(deliveries, "MAX_PACE_S", 3600.0)
    monkeypatch.setattr(deliveries, "PIECES_PER_S", SLOW_PACE)


@pytest.mark.usefixtures("slow")
async def test_the_first_token_and_the_end_are_handed_on_at_once() -> None:
    under_test = Deliveries()
    a, b = under_test.open("a"), under_test.open("b")
    under_test.deliver(step(1, "a"))
    assert tokens(await a.take()) == [1]
    under_test.deliver(step(2, "a"))  # nobody was woken lately who would rest now
    assert tokens(await a.take()) == [2]
    under_test.deliver(step(3, "a", "b"))
    assert tokens(await b.take()) == [3] and await is_asleep(a)
    under_test.deliver(step(4, "a", "b"))
    under_test.deliver(step(5, "a", end="stop"))
    assert tokens(await a.take()) == [3, 4, 5] and await is_asleep(b)
    assert list(under_test) == ["b"]
    under_test.finish("b", FinishReason.ABORT)
    chunks = await b.take()
    assert tokens(chunks) == [4] and chunks[-1].finish_reason is FinishReason.ABORT
    assert len(under_test) == 0


async def test_a_step_after_the_rest_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "PIECES_PER_S", 1 / 0.02)
    under_test = Deliveries()
    box = under_test.open("a")
    for token in range(3):
        under_test.deliver(step(token, "a"))
        async with asyncio.timeout(0):  # there is no waiting in it
            assert tokens(await box.take()) == [token]
        await asyncio.sleep(0.03)


@pytest.mark.usefixtures("slow")
async def test_first_tokens_let_nobody_wait() -> None:
    under_test = Deliveries()
    a, b = under_test.open("a"), under_test.open("b")
    for box, name in ((a, "a"), (b, "b")):
        under_test.deliver(step(1, name))
        await box.take()
    under_test.deliver(step(2, "a"))
    assert tokens(await a.take()) == [2]


async def test_what_came_meanwhile_is_handed_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "PIECES_PER_S", 2 / 0.02)
    under_test = Deliveries()
    boxes = [under_test.open("a"), under_test.open("b")]
    under_test.deliver(step(0, "a", "b"))
    for token in (1, 2, 3):
        under_test.deliver(step(token, "a", "b"))
    for box in boxes:  # they read no sooner: what came with the first is in its list
        assert tokens(await box.take()) == [0, 1, 2, 3]
    under_test.deliver(step(4, "a", "b"))
    under_test.deliver(step(5, "a", "b"))
    assert [tokens(await box.take()) for box in boxes] == [[4, 5], [4, 5]]


async def test_the_pace_follows_the_number_of_answers_up_to_a_limit() -> None:
    under_test = Deliveries()
    names = [str(i) for i in range(1000)]
    for name in names:
        under_test.open(name)
    assert under_test.pace_s == 0  # they wait for their first token
    under_test.deliver(step(1, *names[:10]))
    assert under_test.pace_s == 10 / deliveries.PIECES_PER_S
    under_test.deliver(step(1, *names))
    assert under_test.pace_s == deliveries.MAX_PACE_S


@pytest.mark.usefixtures("slow")
async def test_a_failure_ends_the_wait() -> None:
    under_test = Deliveries()
    box = under_test.open("a")
    under_test.fail("a", ValueError("no"))
    under_test.fail("a", ValueError("it is gone"))
    with pytest.raises(ValueError, match="no"):
        await box.take()
    assert not under_test.close("a")


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=20),
    st.sampled_from([NO_PACE, 3000, 300]),
    st.sampled_from([asyncio.new_event_loop, uvloop.new_event_loop]),
)
def test_every_token_arrives_once_and_in_order(
    bursts: list[list[int]], pace: float, make_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Steps come in bursts, each with a token for the requests up to a number."""

    async def read(box: Mailbox, taken: list[int]) -> None:
        while True:
            chunks = await box.take()
            assert chunks, "woken for nothing"
            taken += tokens(chunks)
            if chunks[-1].finish_reason is not None:
                return

    async def run() -> None:
        under_test, sent = Deliveries(), [0, 0, 0]
        taken: list[list[int]] = [[], [], []]
        boxes = [under_test.open(str(i)) for i in range(3)]
        readers = [asyncio.create_task(read(*pair)) for pair in zip(boxes, taken, strict=True)]
        for burst in bursts:
            for last in burst:
                outputs = [TokenOutput(str(i), [sent[i]]) for i in range(last + 1)]
                under_test.deliver(Step(Variant.FULL, outputs))
                for i in range(last + 1):
                    sent[i] += 1
            await asyncio.sleep(0.0005)
        for i in range(3):
            under_test.deliver(step(sent[i], str(i), end="length"))
        await asyncio.gather(*readers)
        assert taken == [list(range(count + 1)) for count in sent]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deliveries, "PIECES_PER_S", pace)
        with asyncio.Runner(loop_factory=make_loop) as runner:
            runner.run(run())


FIELDS: list[dict[str, Any]] = [
    {"prompt": "x = 'née 🦉'\n", "max_tokens": 40},
    {"prompt": "import os, re\n", "max_tokens": 500, "stop": ["e\ni", "zz"]},
    {"prompt": "import os, re\n", "max_tokens": 30, "logprobs": 2, "return_token_ids": True},
    {"prompt": ["import os", "def"], "max_tokens": 9, "n": 2, "echo": True},
]


@pytest.mark.parametrize("fields", FIELDS)
async def test_the_pace_changes_no_answer(
    fields: dict[str, Any], api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for pace in (NO_PACE, SLOW_PACE):
        monkeypatch.setattr(deliveries, "PIECES_PER_S", pace)
        answer = (await api.post("/v1/completions", json=fields)).json()
        assert answer["usage"].pop("morph")["int4"] == 0
        assert answer["usage"].pop("prompt_tokens_details") == {"cached_tokens": 0}
        answers.append([answer["choices"], answer["usage"]])
    assert answers[0] == answers[1]


@pytest.mark.usefixtures("slow")
async def test_a_stream_has_fewer_pieces_than_tokens(api: httpx.AsyncClient) -> None:
    fields = {"prompt": "import os\n", "max_tokens": 50, "stream": True}
    answer = await api.post("/v1/completions", json=fields)
    *lines, done, _ = answer.text.split("\n\n")
    assert done == "data: [DONE]"
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert len(pieces) <= 3 and pieces[-1]["finish_reason"] == "length"
    whole = (await api.post("/v1/completions", json=fields | {"stream": False})).json()
    assert "".join(piece["text"] for piece in pieces) == whole["choices"][0]["text"]


@pytest.mark.usefixtures("slow")
async def test_what_was_made_is_sent_before_the_answer_breaks_off(
    api: httpx.AsyncClient, client: EngineClient, engine_thread: EngineThread
) -> None:
    fields = {"prompt": "import os\n", "max_tokens": 2000, "stream": True}
    running = asyncio.create_task(api.post("/v1/completions", json=fields))
    while not engine_thread.engines or engine_thread.engine.generated < 50:
        assert not running.done()
        await asyncio.sleep(0.001)
    client.abort_all()
    first, *lines, error, _ = (await running).text.split("\n\n")
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
    assert len("".join(texts)) > 50 and '"error"' in error


async def test_an_echo_is_no_answer(
    api: httpx.AsyncClient, client: EngineClient, engine_thread: EngineThread
) -> None:
    fields = {"prompt": [fake_engine.MUTE], "echo": True, "stream": True}
    running = asyncio.create_task(api.post("/v1/completions", json=fields))
    while not engine_thread.engines or not engine_thread.engine.requests:
        assert not running.done()
        await asyncio.sleep(0.001)
    client.abort_all()
    assert (await running).status_code == 503
