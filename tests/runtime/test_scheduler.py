"""Who runs, who waits, who is preempted; no request is ever lost."""

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from morphserve.configs.schema import SchedulerConfig
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.request import Demands, FinishReason, Request, SamplingParams, Status
from morphserve.runtime.scheduler import Batch, Scheduler

EOS = 2


def request(
    name: str, prompt: int, max_tokens: int = 4, arrival_s: float = 0.0, **params: object
) -> Request:
    """A request with a prompt like no other's."""
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    own = random.Random(name).choices(range(10, 10_000), k=prompt)
    return Request(name, own, sampling, arrival_s)


def like(other: Request, name: str, salt: str = "", max_rung: int | None = None) -> Request:
    """A request with the same prompt."""
    return Request(
        name, other.prompt, other.params, other.arrival_s, Demands(cache_salt=salt), max_rung
    )


def strict(name: str, prompt: int, max_rung: int = 0, **more: float) -> Request:
    """A request that is not to be computed at a deeper rung."""
    made = request(name, prompt, **more)  # type: ignore[arg-type]
    made.max_rung = max_rung
    return made


def scheduler(blocks: int = 16, **config: float) -> Scheduler:
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16} | config
    pool = BlockPool(range(blocks))
    return Scheduler(SchedulerConfig(**settings), pool, 4, max_model_len=64, eos_token_ids=[EOS])


def shape(batch: Batch) -> list[tuple[str, int, int]]:
    return [(piece.request.id, piece.start, piece.end) for piece in batch]


def step(s: Scheduler, token: int = 5, rung: int = 0) -> Batch:
    batch = s.schedule(rung)
    s.update(batch, [token] * sum(piece.samples for piece in batch))
    return batch


def test_a_long_prompt_is_computed_in_chunks_and_decode_goes_first() -> None:
    s = scheduler()
    s.add(request("a", prompt=3))
    assert shape(step(s)) == [("a", 0, 3)]
    s.add(request("b", prompt=20))
    assert shape(step(s)) == [("a", 3, 4), ("b", 0, 15)]
    assert shape(step(s)) == [("a", 4, 5), ("b", 15, 20)]


def test_the_youngest_is_preempted_and_computed_again_with_its_output() -> None:
    s = scheduler(blocks=5)
    s.add(request("old", prompt=7, max_tokens=8))
    s.add(request("young", prompt=6, max_tokens=8))
    for _ in range(3):
        step(s)
    assert shape(step(s)) == [("old", 9, 10)]
    young = s.waiting[0]
    assert (young.id, young.num_computed, young.num_preemptions) == ("young", 0, 1)
    assert s.memory_blocked
    while s.running or s.waiting:
        step(s)
    assert len(young.output) == 8


def test_admission_waits_for_room_for_the_whole_prompt() -> None:
    s = scheduler(blocks=4)
    s.add(request("a", prompt=9))
    s.add(request("b", prompt=9))
    step(s)
    assert [r.id for r in s.waiting] == ["b"]
    assert s.memory_blocked


def test_admission_leaves_each_running_request_a_block_to_grow_into() -> None:
    s = scheduler(blocks=6)
    s.add(request("a", prompt=9))
    s.add(request("b", prompt=9))
    step(s)
    assert [r.id for r in s.waiting] == ["b"]
    assert s.memory_blocked


def test_a_wait_for_memory_is_seen_while_prefill_uses_up_the_steps() -> None:
    s = scheduler(blocks=12)
    s.add(request("long", prompt=40))
    s.add(request("blocked", prompt=20))
    step(s)
    assert s.memory_blocked


def test_a_wait_for_a_free_sequence_is_not_a_wait_for_memory() -> None:
    s = scheduler(max_num_seqs=1)
    s.add(request("a", prompt=4))
    s.add(request("b", prompt=4))
    step(s)
    assert not s.memory_blocked


def test_requests_end_at_eos_stop_ids_and_length() -> None:
    s = scheduler()
    cases = {
        "eos": request("eos", 2),
        "kept": request("kept", 2, ignore_eos=True),
        "stop": request("stop", 2, stop_token_ids=(EOS,), ignore_eos=True),
        "least": request("least", 2, min_tokens=3),
    }
    for r in cases.values():
        s.add(r)
    step(s, token=EOS)
    assert cases["eos"].finish_reason is FinishReason.STOP
    assert cases["stop"].finish_reason is FinishReason.STOP
    assert cases["kept"].status is cases["least"].status is Status.RUNNING
    for _ in range(3):
        step(s)
    assert cases["kept"].finish_reason is cases["least"].finish_reason is FinishReason.LENGTH


def test_demand_looks_ahead_up_to_the_horizon() -> None:
    s = scheduler()
    s.add(request("a", prompt=8, max_tokens=100))
    s.add(request("b", prompt=8, max_tokens=2))
    assert s.demand(horizon=20) == 7 + 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(13, 20),
    st.data(),
)
def test_every_request_ends_and_gives_its_blocks_back(
    sizes: list[tuple[int, int]], blocks: int, data: st.DataObject
) -> None:
    s = scheduler(blocks=blocks)
    requests = [request(str(i), p, max_tokens=n, ignore_eos=True) for i, (p, n) in enumerate(sizes)]
    for r in requests:
        s.add(r)
    aborted = data.draw(st.sets(st.sampled_from([r.id for r in requests]), max_size=3))
    for turn in range(2000):
        if not s.running and not s.waiting:
            break
        if turn == 3:
            for name in sorted(aborted):
                s.abort(name)
        step(s)
        s._pool.check([r.blocks for r in s.running])
    assert all(r.status is Status.FINISHED for r in requests)
    assert s._pool.num_used == 0
    for r in requests:
        if r.finish_reason is FinishReason.LENGTH:
            assert len(r.output) == r.params.max_tokens
        else:
            assert r.id in aborted


def test_the_longest_cached_beginning_is_taken_over_and_a_token_is_left_to_compute() -> None:
    s = scheduler()
    first = request("first", prompt=8)
    s.add(first)
    while s.running or s.waiting:
        step(s)
    s.add(like(first, "same"))
    assert shape(s.schedule()) == [("same", 4, 8)]
    s.abort("same")
    longer = Request("longer", first.prompt + first.output + [9, 9], first.params, 0.0)
    s.add(longer)
    assert shape(s.schedule()) == [("longer", 8, 14)], "the last output token was never computed"
    assert (longer.num_cached_tokens, s.reuse.hits, s.reuse.queries) == (8, 12, 8 + 8 + 14)


def test_output_is_taken_over_like_a_prompt() -> None:
    s = scheduler()
    first = request("first", prompt=8, max_tokens=9)
    s.add(first)
    while s.running or s.waiting:
        step(s)
    s.add(Request("next turn", first.prompt + first.output + [9], first.params, 0.0))
    assert shape(s.schedule()) == [("next turn", 16, 18)]


def test_another_salt_shares_nothing() -> None:
    s = scheduler()
    first = request("first", prompt=9)
    s.add(first)
    step(s)
    s.add(like(first, "theirs", salt="theirs"))
    assert shape(step(s)) == [("first", 9, 10), ("theirs", 0, 9)]


def test_blocks_are_shared_while_they_are_used_and_demand_counts_them_once() -> None:
    s = scheduler(blocks=8)
    first = request("first", prompt=12, max_tokens=4)
    s.add(first)
    step(s)
    second = like(first, "second")
    s.add(second)
    assert s.demand(horizon=4) == 4 + 2, "two of its four blocks are there and used"
    step(s)
    assert first.blocks[:2] == second.blocks[:2]
    assert s._pool.num_used == 6
    assert s.demand(horizon=4) == 6


def test_an_idle_beginning_that_several_wait_for_is_demanded_once() -> None:
    s = scheduler(blocks=8)
    first = request("first", prompt=12, max_tokens=1)
    s.add(first)
    step(s)
    for name in "abc":
        s.add(like(first, name))
    assert s.demand(horizon=1) == 2 + 3 * 2


def test_a_preempted_request_takes_its_own_blocks_over() -> None:
    s = scheduler(blocks=5)
    s.add(request("old", prompt=7, max_tokens=6))
    s.add(request("young", prompt=6, max_tokens=8))
    while not s.num_preemptions:
        step(s)
    (young,) = s.waiting
    while s.waiting:
        batch = step(s)
    assert shape(batch) == [("young", 8, 9)]
    assert (young.num_cached_tokens, s.reuse.queries) == (0, 13), "of first admissions alone"


def test_kv_from_a_deeper_rung_is_not_taken_for_kv_of_full_precision() -> None:
    s = scheduler()
    first = request("first", prompt=9, max_tokens=1)
    s.add(first)
    step(s, rung=2)
    s.add(like(first, "full"))
    assert shape(s.schedule(rung=0)) == [("full", 0, 9)]
    s.abort("full")
    s.add(like(first, "deep"))
    assert shape(s.schedule(rung=3)) == [("deep", 8, 9)]


def test_what_follows_kv_of_a_deeper_rung_is_kept_as_such() -> None:
    s = scheduler()
    first = request("first", prompt=9, max_tokens=20)
    s.add(first)
    step(s, rung=2)
    for _ in range(8):
        step(s, rung=0)
    s.abort("first")
    s.add(Request("next", first.prompt + first.output, first.params, 0.0))
    assert shape(s.schedule(rung=0)) == [("next", 0, 16)]


def test_an_error_leaves_nothing_in_the_cache() -> None:
    s = scheduler()
    first = request("first", prompt=20)
    s.add(first)
    step(s)
    batch = s.schedule()
    s.update(batch, [None])
    assert first.finish_reason is FinishReason.ERROR
    assert s._pool.num_cached == 0


def test_without_prefix_caching_nothing_is_looked_up_or_kept() -> None:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16)
    s = Scheduler(config, BlockPool(range(16)), 4, 64, [EOS], prefix_caching=False)
    first = request("first", prompt=9, max_tokens=1)
    s.add(first)
    step(s)
    s.add(like(first, "second"))
    assert shape(s.schedule()) == [("second", 0, 9)]
    assert (s._pool.num_cached, s.reuse.queries) == (0, 0)


def test_several_choices_of_one_prompt_are_counted_one_by_one() -> None:
    s = scheduler(blocks=12, max_num_batched_tokens=32)
    choices = [request("0", prompt=9, max_tokens=3)]
    choices += [like(choices[0], str(i)) for i in range(1, 3)]
    for choice in choices:
        s.add(choice)
    assert s.demand(horizon=8) == 9
    step(s)
    assert s._pool.num_used == s.demand(horizon=8) == 9
    s.add(like(choices[0], "late"))
    assert s.demand(horizon=8) == 10
    while s.running or s.waiting:
        step(s)
        s._pool.check([r.blocks for r in s.running])
    assert s._pool.num_used == 0


def test_who_needs_precision_is_passed_over_while_layers_are_demoted() -> None:
    s = scheduler()
    s.add(strict("strict", prompt=4))
    s.add(request("any", prompt=4))
    assert shape(step(s, rung=1)) == [("any", 0, 4)]
    assert (s.num_held, len(s.waiting), s.memory_blocked) == (1, 0, False)
    assert shape(step(s, rung=0)) == [("any", 4, 5), ("strict", 0, 4)]
    assert s.num_held == 0


def test_who_runs_and_needs_precision_pauses_and_keeps_its_blocks() -> None:
    s = scheduler()
    paused = strict("strict", prompt=6)
    s.add(paused)
    s.add(request("any", prompt=4))
    step(s)
    blocks = list(paused.blocks)
    assert shape(step(s, rung=1)) == [("any", 4, 5)]
    assert (s.num_held, paused.blocks) == (1, blocks)
    s.abort("any")
    assert step(s, rung=1) == []
    assert not s.has_work
    assert shape(step(s, rung=0)) == [("strict", 6, 7)]


def test_a_rung_that_is_allowed_is_no_reason_to_wait() -> None:
    s = scheduler()
    s.add(strict("strict", prompt=4, max_rung=2))
    assert shape(step(s, rung=2)) == [("strict", 0, 4)]
    assert step(s, rung=3) == []


def test_a_paused_request_gives_its_blocks_up_when_nothing_else_could_run() -> None:
    s = scheduler(blocks=4)
    s.add(strict("strict", prompt=10))
    step(s)
    s.add(request("any", prompt=10))
    assert shape(step(s, rung=1)) == [("any", 0, 10)]
    assert [r.id for r in s.held] == ["strict"]
    while s.running:
        step(s, rung=1)
    assert shape(step(s, rung=0)) == [("strict", 0, 11)]


def test_who_would_be_held_up_deeper_down_is_no_reason_to_go_there() -> None:
    s = scheduler(blocks=4)
    s.add(strict("a", prompt=9))
    s.add(strict("b", prompt=9))
    step(s)
    assert [r.id for r in s.waiting] == ["b"]
    assert not s.memory_blocked
    assert s.demand(horizon=8) == 0
    s.add(request("any", prompt=4))
    step(s)
    assert s.memory_blocked
    assert s.demand(horizon=8) == 2


def test_a_request_that_waits_too_long_for_its_first_turn_ends() -> None:
    s = scheduler(blocks=4, queue_timeout_s=5.0)
    s.add(request("runs", prompt=9, max_tokens=6))
    s.add(request("waits", prompt=9, arrival_s=1.0))
    s.add(strict("held", prompt=4, max_rung=0, arrival_s=2.0))
    step(s, rung=1)
    assert s.expire(now_s=6.0) == []
    assert [r.id for r in s.expire(now_s=6.5)] == ["waits"]
    (held,) = s.expire(now_s=7.5)
    assert held.finish_reason is FinishReason.TIMEOUT
    assert (list(s.waiting), s.held, len(s.running)) == ([], [], 1)


def test_a_preempted_request_is_never_timed_out() -> None:
    s = scheduler(blocks=5, queue_timeout_s=5.0)
    s.add(request("old", prompt=7, max_tokens=8))
    s.add(request("young", prompt=6, max_tokens=8))
    while not s.num_preemptions:
        step(s)
    s.add(request("new", prompt=6, arrival_s=1.0))
    assert [r.id for r in s.expire(now_s=100.0)] == ["new"]
    assert [r.id for r in s.waiting] == ["young"]
