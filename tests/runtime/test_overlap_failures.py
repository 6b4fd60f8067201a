"""Steps that fail while another one is in flight."""

import logging
import random
from collections.abc import Callable

import pytest
from deferred_runner import DeferredRunner, Overlapping, defer, use_runner
from overlap_scenes import TIGHT, Ask, Client, alone, check_answers, engine_of, greedy, sampled

from morphserve.runtime.parts import DeviceLost, Launched, Sampled
from morphserve.runtime.scheduler import Batch

COUNT = 12


class Failing(Overlapping):
    """Fails to launch from the `nth` launch on, if one of these requests is in the batch."""

    def __init__(self, runner: DeferredRunner, nth: int, guilty: set[str], error: Exception):
        self._runner, self._nth, self._guilty, self._error = runner, nth, guilty, error
        self._launches = 0

    def launch(self, batch: Batch) -> Launched:
        self._launches += 1
        if self._launches >= self._nth and self._guilty & {piece.request.id for piece in batch}:
            raise self._error
        return self._runner.launch(batch)


class Altering(Overlapping):
    """Changes what the requests get from the `nth` step."""

    def __init__(
        self, runner: DeferredRunner, nth: int, change: Callable[[list[Sampled]], list[Sampled]]
    ) -> None:
        self._runner, self._nth, self._change = runner, nth, change
        self._launches = 0

    def launch(self, batch: Batch) -> Launched:
        self._launches += 1
        launched = self._runner.launch(batch)
        return Altered(launched, self._change) if self._launches == self._nth else launched


class Altered:
    def __init__(
        self, launched: Launched, change: Callable[[list[Sampled]], list[Sampled]]
    ) -> None:
        self._launched, self._change = launched, change

    def result(self) -> list[Sampled]:
        return self._change(self._launched.result())


def three(client: Client) -> None:
    for i in range(3):
        client.submit(Ask(i, 7, sampled(COUNT)))


@pytest.mark.parametrize("nth", range(1, COUNT + 1))
def test_of_a_step_that_fails_for_one_request_nothing_else_is_lost(
    nth: int, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(engine_of(2000))
    failing = Failing(defer(client.engine), nth, {"r1"}, RuntimeError("injected"))
    use_runner(client.engine, failing)
    three(client)
    client.drain()
    for name in ("r0", "r2"):
        assert (client.told[name].tokens, client.told[name].reason) == alone(client.asked[name])
    lost = client.told["r1"]
    assert (lost.tokens, lost.reason) == (alone(client.asked["r1"])[0][: nth - 1], "error")
    assert len([record for record in caplog.records if record.exc_info]) == 1
    (event,) = [e for e in client.engine.take_events() if e.kind == "error"]
    assert event.numbers == {"requests": 3, "lost": 1}
    assert client.engine.snapshot().blocks_used == 0


def test_a_failure_does_not_bring_back_who_ends_in_the_step_before_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """r0 ends with its second token, while the launch of its third fails."""
    caplog.set_level(logging.CRITICAL)
    tokens, _ = alone(Ask(0, 7, sampled(COUNT)))
    client = Client(engine_of(2000))
    failing = Failing(defer(client.engine), 3, {"r0"}, RuntimeError("injected"))
    use_runner(client.engine, failing)
    client.submit(Ask(0, 7, sampled(COUNT, stop_token_ids=(tokens[1],))))
    client.submit(Ask(1, 7, sampled(COUNT)))
    client.drain()
    check_answers(client)
    (event,) = [e for e in client.engine.take_events() if e.kind == "error"]
    assert event.numbers == {"requests": 1, "lost": 0}


class Flaky(Overlapping):
    """Fails now and then, for several requests at once."""

    def __init__(self, runner: DeferredRunner, draw: random.Random) -> None:
        self._runner, self._draw = runner, draw

    def launch(self, batch: Batch) -> Launched:
        if len(batch) > 1 and self._draw.random() < 0.3:
            raise RuntimeError("injected")
        return self._runner.launch(batch)


@pytest.mark.parametrize("seed", range(20))
def test_failures_that_do_not_repeat_cost_nobody_anything(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    draw = random.Random(seed)
    client = Client(engine_of(TIGHT))
    use_runner(client.engine, Flaky(defer(client.engine), draw))
    for _ in range(60):
        match draw.randrange(5):
            case 0 | 1:
                params = sampled(draw.randint(1, 20), stop_token_ids=tuple(range(2, 96, 13)))
                client.submit(Ask(draw.randrange(3), draw.randint(1, 40), params))
            case 2 if client.asked:
                client.abort(draw.choice(list(client.asked)))
            case 3:
                client.engine.pin(draw.choice([0, 3, 10]))
        client.step()
    client.engine.pin(0)
    client.drain()
    check_answers(client)
    assert any(event.kind == "error" for event in client.engine.take_events())


def test_a_lost_device_ends_the_engine() -> None:
    client = Client(engine_of(2000))
    use_runner(client.engine, Failing(defer(client.engine), 3, {"r0"}, DeviceLost("injected")))
    three(client)
    with pytest.raises(DeviceLost):
        client.drain()


def test_a_step_that_cannot_be_read_ends_the_engine() -> None:
    """Nobody could go on: what was launched since stands on tokens that are not known."""

    def fail(sampled: list[Sampled]) -> list[Sampled]:
        raise RuntimeError("injected")

    client = Client(engine_of(2000))
    use_runner(client.engine, Altering(defer(client.engine), 3, fail))
    three(client)
    with pytest.raises(RuntimeError, match="injected"):
        client.drain()


@pytest.mark.parametrize("nth", [1, 2, 5, COUNT])
def test_logits_that_are_not_finite_end_a_request_and_what_it_left_behind(nth: int) -> None:
    def spoil(sampled: list[Sampled]) -> list[Sampled]:
        return [sampled[0], Sampled(None), *sampled[2:]]

    client = Client(engine_of(2000, max_num_batched_tokens=64))
    use_runner(client.engine, Altering(defer(client.engine), nth, spoil))
    for i in range(3):
        client.submit(Ask(i, 17, sampled(COUNT)))
    client.drain()
    for name in ("r0", "r2"):
        assert (client.told[name].tokens, client.told[name].reason) == alone(client.asked[name])
    lost = client.told["r1"]
    assert (lost.tokens, lost.reason) == (alone(client.asked["r1"])[0][: nth - 1], "error")
    state = client.engine.snapshot()
    assert (state.blocks_used, state.blocks_cached) == (0, 2 * ((17 + COUNT - 1) // 8))
    assert state.num_generated == 2 * COUNT + nth - 1


def test_a_request_without_a_sound_token_may_be_asked_again() -> None:
    client = Client(engine_of(2000))
    runner = defer(client.engine)
    use_runner(client.engine, Altering(runner, 2, lambda sampled: [Sampled(None)]))
    client.submit(Ask(0, 17, greedy(5, ignore_eos=True)))
    client.drain()
    again = client.submit(Ask(0, 17, greedy(5, ignore_eos=True)))
    client.drain()
    assert (client.told[again].tokens, client.told[again].reason) == alone(client.asked[again])
