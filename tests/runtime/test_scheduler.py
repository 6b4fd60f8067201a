"""Who runs, who waits, who is preempted; no request is ever lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from morphserve.configs.schema import SchedulerConfig
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.request import FinishReason, Request, SamplingParams, Status
from morphserve.runtime.scheduler import Batch, Scheduler

EOS = 2


def request(name: str, prompt: int, max_tokens: int = 4, **params: object) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Request(name, list(range(10, 10 + prompt)), sampling, arrival_s=0.0)


def scheduler(blocks: int = 16, **config: int) -> Scheduler:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 16} | config
    pool = BlockPool(range(blocks))
    return Scheduler(SchedulerConfig(**settings), pool, 4, max_model_len=64, eos_token_ids=[EOS])


def shape(batch: Batch) -> list[tuple[str, int, int]]:
    return [(piece.request.id, piece.start, piece.end) for piece in batch]


def step(s: Scheduler, token: int = 5) -> Batch:
    batch = s.schedule()
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
