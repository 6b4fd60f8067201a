"""Steps whose tokens are read one step late: the same answers, and nothing told twice or lost."""

import socket
import threading
from collections.abc import Callable, Sequence

import msgspec
import pytest
from deferred_runner import Overlapping, defer, use_runner
from hypothesis import given, settings
from hypothesis import strategies as st
from overlap_scenes import (
    TIGHT,
    Ask,
    Client,
    ManualClock,
    alone,
    check_answers,
    engine_of,
    greedy,
    overlapping,
    sampled,
)

from morphserve.configs.load import load_policy
from morphserve.configs.schema import EngineConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.engine import Engine
from morphserve.runtime.engine_process import run_engine
from morphserve.runtime.frames import FrameSplitter, encode_frame
from morphserve.runtime.messages import Abort, FromEngine, Shutdown, Step, Submit
from morphserve.runtime.parts import Launched, Sampled
from morphserve.runtime.request import SamplingParams
from morphserve.runtime.scheduler import Batch

params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.0, 0.9]),
    seed=st.integers(0, 2),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 1.5]),
    logprobs=st.sampled_from([None, 1]),
    min_tokens=st.sampled_from([0, 0, 5]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), tuple(range(3, 96, 9))]),
)
asks = st.builds(
    Ask,
    seed=st.integers(0, 2),
    length=st.integers(1, 40),
    params=params,
    min_precision=st.sampled_from([Variant.INT4, Variant.INT4, Variant.INT8, Variant.FULL]),
)
Action = Callable[[Client], object]


def _steps(count: int) -> Action:
    return lambda client: [client.step() for _ in range(count)]


def _abort(nth: int) -> Action:
    def act(client: Client) -> None:
        if client.asked:
            client.abort(list(client.asked)[-1 - nth % len(client.asked)])

    return act


actions = st.one_of(
    asks.map(lambda ask: lambda client: client.submit(ask)),
    asks.map(lambda ask: lambda client: client.submit(ask)),
    st.integers(1, 5).map(_steps),
    st.integers(1, 5).map(_steps),
    st.integers(0, 4).map(_abort),
    st.sampled_from([None, 0, 2, 5, 10]).map(lambda rung: lambda client: client.engine.pin(rung)),
)


@settings(max_examples=60, deadline=None)
@given(script=st.lists(actions, min_size=5, max_size=40))
def test_answers_are_those_of_an_engine_that_waits_for_each_step(script: Sequence[Action]) -> None:
    client, runner = overlapping(TIGHT)
    for act in script:
        act(client)
    client.engine.pin(0)
    client.drain()
    check_answers(client)
    assert not client.engine._steps.is_one_in_flight


def test_the_first_step_tells_nothing_and_each_one_after_it_a_token() -> None:
    client, runner = overlapping()
    name = client.submit(Ask(1, 20, greedy(3, ignore_eos=True)))
    told = []
    for _ in range(4):
        assert client.engine.has_work
        client.step()
        told.append(len(client.told[name].tokens) if client.told else 0)
    assert told == [0, 1, 2, 3]
    assert not client.engine.has_work
    assert runner.num_launches == 3, "a request that ends by length was launched again"
    assert (runner.num_overlapped, runner.num_unknown) == (2, 2)


def test_an_end_that_is_found_late_drops_what_was_computed_beyond_it() -> None:
    tokens, _ = alone(Ask(1, 20, sampled(12)))
    count = len(tokens) // 2
    assert tokens[count - 1] not in tokens[: count - 1]
    client, runner = overlapping()
    ends = client.submit(Ask(1, 20, sampled(12, stop_token_ids=(tokens[count - 1],))))
    client.drain()
    assert (client.told[ends].tokens, client.told[ends].reason) == (tokens[:count], "stop")
    assert runner.num_launches == count + 1
    state = client.engine.snapshot()
    assert (state.num_generated, state.steps, state.blocks_used) == (count, count + 1, 0)


@pytest.mark.parametrize("length", range(17, 26))  # the end at each place in a block of eight
def test_a_block_holds_no_more_than_its_name_says_where_an_end_was_found_late(length: int) -> None:
    tokens, _ = alone(Ask(2, length, sampled(6)))
    client, _ = overlapping()
    client.submit(Ask(2, length, sampled(6, stop_token_ids=(tokens[-1],))))
    client.drain()
    end = length + tokens.index(tokens[-1])  # of what has keys and values
    assert client.engine.snapshot().blocks_cached == end // 8
    client.submit(Ask(2, length, sampled(20)))
    client.drain()
    check_answers(client)


def test_an_aborted_request_is_told_nothing_of_the_step_in_flight() -> None:
    client, _ = overlapping()
    gone, stays = (client.submit(Ask(i, 9, greedy(8, ignore_eos=True))) for i in (0, 1))
    for _ in range(3):
        client.step()
    client.abort(gone)
    assert len(client.told[gone].tokens) == 2
    again = client.submit(Ask(2, 50, greedy(4)))  # in blocks that the step in flight may write to
    client.drain()
    assert client.told.keys() == {gone, stays, again}
    check_answers(client)


def test_a_request_with_penalties_waits_for_its_tokens() -> None:
    client, runner = overlapping()
    client.submit(Ask(1, 20, greedy(8, ignore_eos=True, presence_penalty=1.0)))
    client.drain()
    assert (runner.num_launches, runner.num_overlapped) == (8, 0)
    check_answers(client)


def test_what_ends_spares_others_a_preemption() -> None:
    """The pool is full, and the step in flight holds somebody's last token."""
    client, _ = overlapping(TIGHT, max_num_batched_tokens=64)
    client.submit(Ask(0, 20, greedy(26, ignore_eos=True)))
    client.submit(Ask(1, 26, greedy(7, ignore_eos=True)))
    client.drain()
    check_answers(client)
    assert client.engine.snapshot().preemptions == 0


def test_a_request_that_may_no_longer_run_is_paused_with_all_its_tokens_known() -> None:
    client, _ = overlapping()
    strict = client.submit(Ask(0, 20, greedy(30, ignore_eos=True), Variant.FULL))
    client.submit(Ask(1, 20, greedy(40, ignore_eos=True)))
    for _ in range(4):
        client.step()
    client.engine.pin(4)
    while client.engine.snapshot().held == 0:
        client.step()
    (request,) = [r for r in client.engine._parts.scheduler.running if r.id == strict]
    assert not request.is_pending
    client.engine.pin(0)
    client.drain()
    check_answers(client)


def test_a_request_that_waited_too_long_ends_while_a_step_is_in_flight() -> None:
    clock = ManualClock()
    client = Client(engine_of(200, clock, max_num_seqs=1, queue_timeout_s=10.0))
    defer(client.engine)
    runs, waits = (client.submit(Ask(i, 20, greedy(5, ignore_eos=True))) for i in (0, 1))
    client.step()
    clock.seconds += 11
    client.step()
    assert (client.told[waits].tokens, client.told[waits].reason) == ([], "timeout")
    client.drain()
    assert client.told[runs].tokens == alone(client.asked[runs])[0]


class Noting(Overlapping):
    """A runner that notes what it is given; to wait for a step takes half a second."""

    def __init__(self, client: Client, clock: ManualClock) -> None:
        self._client, self._clock = client, clock
        self._runner = defer(client.engine)
        use_runner(client.engine, self)
        self.batches: list[Batch] = []
        self.variants: list[set[Variant]] = []

    def launch(self, batch: Batch) -> Launched:
        self.batches.append(batch)
        self.variants.append(set(self._client.engine._parts.layers.variants))
        return Late(self._runner.launch(batch), self._clock)


class Late:
    def __init__(self, launched: Launched, clock: ManualClock) -> None:
        self._launched, self._clock = launched, clock

    def result(self) -> list[Sampled]:
        self._clock.seconds += 0.5
        return self._launched.result()


def test_a_step_is_told_with_the_precision_that_it_was_computed_with() -> None:
    client = Client(engine_of(2000))
    noting = Noting(client, ManualClock())
    client.submit(Ask(0, 20, greedy(40, ignore_eos=True)))
    told: list[Variant] = []
    for turn in range(42):
        client.engine.pin((0, 10, 0)[turn // 14])
        if (step := client.step()) and any(output.tokens for output in step.outputs):
            told.append(step.precision)
    lowest = [min(v, key=list(Variant)[::-1].index) for v in noting.variants]
    assert told == lowest[: len(told)] and len(told) == 40
    assert len(set(told)) == 3
    assert client.engine.snapshot().generated_tokens == {v: told.count(v) for v in set(told)}


def test_a_step_lasts_from_the_end_of_the_one_before_it() -> None:
    clock = ManualClock()
    client = Client(engine_of(2000, clock))
    noting = Noting(client, clock)
    client.submit(Ask(0, 20, greedy(3, ignore_eos=True)))
    client.step()
    clock.seconds += 0.125  # beside the first step
    for nth in range(3):
        client.step()
        state = client.engine.snapshot()
        assert state.steps == nth + 1
        assert state.step_s == (0.625 if nth == 0 else 0.5)
        assert client.engine._monitor._latest is noting.batches[nth]
    clock.seconds += 100
    client.submit(Ask(1, 20, greedy(1)))
    client.drain()
    assert client.engine.snapshot().step_s == 0.5


def test_a_process_serves_messages_one_step_late() -> None:
    ours, theirs = socket.socketpair()
    asks = {f"r{i}": Ask(i % 3, 5 + 4 * i, greedy(6 + i, ignore_eos=i % 2 == 0)) for i in range(9)}

    def make_engine(config: EngineConfig) -> Engine:
        engine = engine_of(TIGHT)
        defer(engine)
        return engine

    thread = threading.Thread(target=run_engine, args=[theirs, make_engine])
    thread.start()
    ours.sendall(encode_frame(EngineConfig("", load_policy("performance"))))
    for name, ask in asks.items():
        ours.sendall(encode_frame(Submit(name, ask.prompt, ask.params)))
    ours.sendall(encode_frame(Submit("gone", asks["r0"].prompt, greedy(40, ignore_eos=True))))
    ours.sendall(encode_frame(Abort("gone")))
    tokens, reasons = _listen(ours, len(asks))
    ours.sendall(encode_frame(Shutdown()))
    thread.join(timeout=10)
    assert not thread.is_alive()
    ours.close()
    theirs.close()
    for name, ask in asks.items():
        assert (tokens[name], reasons[name]) == alone(ask)


def _listen(sock: socket.socket, count: int) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Tokens and reasons, until so many requests have ended."""
    splitter, decoder = FrameSplitter(), msgspec.msgpack.Decoder(FromEngine)
    tokens: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    sock.settimeout(10)
    while len(reasons) < count:
        for body in splitter.feed(sock.recv(1 << 16)):
            message = decoder.decode(body)
            for output in message.outputs if isinstance(message, Step) else []:
                tokens.setdefault(output.request_id, []).extend(output.tokens)
                if output.finish_reason:
                    reasons[output.request_id] = output.finish_reason
    return tokens, reasons


def test_time_with_nothing_to_do_is_given_to_the_runner() -> None:
    client = Client(engine_of(2000))
    runner = Resting(client)
    client.step()
    assert runner.rests == 1
    client.submit(Ask(0, 4, SamplingParams(3, temperature=0.0)))
    while client.engine.has_work:
        client.step()
    assert runner.rests == 1, "it had to rest while somebody waited for a token"
    client.step()
    assert runner.rests == 2


def test_swaps_have_the_time_with_nothing_else_to_do_first() -> None:
    client = Client(engine_of(2000))
    runner = Resting(client)
    client.engine.pin(10)
    turns = 0
    while client.engine.snapshot().rung != 10 or client.engine.snapshot().swapping:
        client.step()
        turns += 1
    assert turns > 2 and runner.rests <= 1
    client.step()
    assert runner.rests > 0


class Resting(Overlapping):
    """Counts how often it may prepare."""

    def __init__(self, client: Client) -> None:
        self._runner = defer(client.engine)
        use_runner(client.engine, self)
        self.rests = 0

    def launch(self, batch: Batch) -> Launched:
        return self._runner.launch(batch)

    def prepare(self) -> bool:
        self.rests += 1
        return True
