"""Paged attention on a GPU, or interpreted, against the reference over scrambled pages."""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import cuda_pages, make_meta, page_items, rotations, scatter_pages
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta
from morphserve.runtime.kernels.cuda import splits
from morphserve.runtime.kernels.cuda.attention import attention
from morphserve.runtime.kernels.cuda.splits import plan_splits
from morphserve.runtime.kernels.reference import ReferenceKernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = ReferenceKernels()
# Of results of unit size. Bfloat16 rounds weights by up to 2^-9 and the result once more; where one
# token has most of the weight, both show in full.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.02}


def _shape(heads: int, groups: int, dim: int, block: int) -> AttentionShape:
    return AttentionShape(heads, groups, dim, block, 1e-6)


SMALL = _shape(4, 2, 16, 8)
SHAPES = [
    _shape(8, 2, 128, 32),
    _shape(9, 3, 64, 16),
    _shape(7, 1, 80, 64),
    _shape(16, 1, 96, 8),
    _shape(2, 2, 256, 32),
    _shape(3, 1, 6, 16),
]


class Batch:
    """K and V of each token of each context; whatever else the pages hold is not a number."""

    def __init__(
        self,
        shape: AttentionShape,
        contexts: list[int],
        new: list[int],
        dtype: torch.dtype = torch.bfloat16,
        size: float = 1.0,
    ) -> None:
        pages = scatter_pages(contexts, shape.block_tokens)
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.shape = shape
        self.meta = make_meta(contexts, new, pages, shape.block_tokens)
        self.pages = torch.full((sum(map(len, pages)) + 1, page_items(shape)), torch.nan).to(dtype)
        everything = make_meta(contexts, contexts, pages, shape.block_tokens)
        kv = torch.randn(sum(contexts), width) * size
        table = rotations(max(contexts), shape.head_dim)
        REFERENCE.rope_write_kv(kv, self.pages, everything, shape, table, None)
        heads = torch.randn(sum(new), shape.num_heads, shape.head_dim) * size
        self.q = heads.to(dtype)
        self.cache = cuda_pages(self.pages, shape).to(DEVICE)

    def wanted(self) -> Tensor:
        return REFERENCE.attention(self.q, self.pages, self.meta, self.shape)

    def attend(self) -> Tensor:
        meta = _on_device(self.meta)
        plan = plan_splits(meta, self.shape)
        return attention(self.q.to(DEVICE), self.cache, meta, plan, self.shape).cpu()

    def check(self) -> None:
        _close(self.attend(), self.wanted())


def _on_device(meta: BatchMeta) -> BatchMeta:
    return BatchMeta(**{field.name: getattr(meta, field.name).to(DEVICE) for field in fields(meta)})


def _close(got: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def _padded(meta: BatchMeta, sequences: int) -> BatchMeta:
    """The batch with as many more sequences of one token that no cache holds."""
    last, table = int(meta.query_start[-1]), meta.block_table
    starts = torch.arange(last + 1, last + 1 + sequences, dtype=torch.int32)
    none = torch.zeros(sequences, dtype=torch.int32)
    return BatchMeta(
        positions=torch.cat([meta.positions, none]),
        token_page=torch.cat([meta.token_page, none - 1]),
        token_slot=torch.cat([meta.token_slot, none]),
        query_start=torch.cat([meta.query_start, starts]),
        context_len=torch.cat([meta.context_len, none]),
        block_table=torch.cat([table, table.new_full((sequences, table.shape[1]), 999_999)]),
    )


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, each takes its time, even one without tokens."""
    monkeypatch.setattr(splits, "PROGRAMS", 16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_matches_the_reference(shape: AttentionShape, dtype: torch.dtype) -> None:
    Batch(shape, [1, 64, 65, 137, 32], [1] * 5, dtype).check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_of_many_tiles_match_the_reference(
    shape: AttentionShape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "PROGRAMS", 1)  # runs as long as the longest context
    Batch(shape, [200, 3], [1, 1], dtype).check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_and_decodes_in_one_batch_match_the_reference(
    shape: AttentionShape, dtype: torch.dtype
) -> None:
    Batch(shape, [40, 9, 101, 2], [40, 1, 34, 2], dtype).check()


def test_a_long_context_is_read_by_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "PROGRAMS", 64)
    batch = Batch(SMALL, [1500, 3], [1, 1])
    assert plan_splits(_on_device(batch.meta), SMALL).splits[:, 0].tolist() == [0, 0, 24]
    batch.check()


def test_a_long_prompt_is_computed_in_chunks() -> None:
    Batch(_shape(3, 1, 16, 16), [700], [150]).check()


SEQUENCES = st.lists(
    st.tuples(st.integers(1, 2) | st.integers(1, 70), st.integers(0, 150)), min_size=1, max_size=5
)


@settings(max_examples=12)
@given(
    share=st.sampled_from([1, 2, 3, 5, 7, 16]),
    groups=st.integers(1, 2),
    dim=st.sampled_from([2, 16, 40, 64]),
    block=st.sampled_from([8, 16, 32, 64]),
    dtype=st.sampled_from(list(TOLERANCE)),
    sequences=SEQUENCES,
    padding=st.integers(0, 2),
)
def test_any_batch_matches_the_reference(
    share: int,
    groups: int,
    dim: int,
    block: int,
    dtype: torch.dtype,
    sequences: list[tuple[int, int]],
    padding: int,
) -> None:
    new, contexts = [n for n, _ in sequences], [n + before for n, before in sequences]
    batch = Batch(_shape(share * groups, groups, dim, block), contexts, new, dtype)
    wanted = batch.wanted()
    batch.meta = _padded(batch.meta, padding)
    batch.q = torch.cat([batch.q, torch.full_like(batch.q[:1], torch.nan).repeat(padding, 1, 1)])
    got = batch.attend()
    _close(got[: sum(new)], wanted)
    assert not got[sum(new) :].any()


def test_large_scores_overflow_nothing() -> None:
    batch = Batch(SMALL, [300, 90], [1, 20], size=20.0)
    _close(batch.attend() / 20, batch.wanted() / 20)


def test_rows_of_queries_tables_and_pages_may_lie_apart() -> None:
    batch = Batch(SMALL, [30, 9, 41], [1, 1, 20])
    wanted = batch.wanted()
    wide = torch.full((len(batch.q), 9, 16), torch.nan, dtype=torch.bfloat16)
    wide[:, :4] = batch.q
    table = torch.full((3, 50), -999_999, dtype=torch.int32)
    table[:, : batch.meta.block_table.shape[1]] = batch.meta.block_table
    cache = batch.cache.new_full((len(batch.cache), page_items(SMALL) + 40), torch.nan)
    cache[:, : page_items(SMALL)] = batch.cache
    batch.q, batch.cache = wide[:, :4], cache[:, : page_items(SMALL)]
    batch.meta = replace(batch.meta, block_table=table[:, : batch.meta.block_table.shape[1]])
    _close(batch.attend(), wanted)


def test_pages_may_lie_gigabytes_apart() -> None:
    batch = Batch(SMALL, [20, 21], [1, 4])
    pages, items = batch.cache.shape
    apart = (2**31 // (pages - 2)) // 16 * 16  # the last page lies beyond what 32 bits count
    memory = torch.empty((pages - 1) * apart + items, dtype=torch.bfloat16, device=DEVICE)
    cache = memory.as_strided((pages, items), (apart, 1))
    cache.copy_(batch.cache)
    batch.cache = cache
    batch.check()


@settings(max_examples=40)
@given(
    sequences=st.lists(
        st.tuples(st.sampled_from([1, 1, 1, 5]), st.integers(0, 300) | st.integers(0, 20_000)),
        min_size=1,
        max_size=20,
    ),
    groups=st.sampled_from([1, 2, 8]),
)
def test_a_plan_holds_each_token_of_each_decode_once(
    sequences: list[tuple[int, int]], groups: int
) -> None:
    queries, contexts = (torch.tensor(column) for column in zip(*sequences, strict=True))
    starts = torch.cat([torch.zeros(1), queries.cumsum(0)]).int()
    none = torch.empty(0, dtype=torch.int32)
    meta = _on_device(BatchMeta(none, none, none, starts, contexts.int(), none))
    plan = plan_splits(meta, _shape(groups, groups, 16, 16))
    runs = [tuple(run) for run in plan.runs.T.tolist()]
    used = [run for run in runs if run[0] >= 0]
    assert runs[: len(used)] == used
    wanted_splits = []
    for i, (count, context) in enumerate(sequences):
        own = [run for run in used if run[0] == i]
        assert bool(own) == (count == 1)
        ends = [0] + [end for *_, end, _ in own]
        assert [begin for _, _, begin, _, _ in own] == ends[:-1]
        assert not own or ends[-1] == context
        assert {run[1] for run in own} <= {int(starts[i])}
        assert {bool(run[4]) for run in own} <= {len(own) == 1}
        if len(own) > 1:
            first = used.index(own[0])
            wanted_splits.append((int(starts[i]), first, first + len(own)))
    got_splits = [tuple(split) for split in plan.splits.T.tolist()]
    assert got_splits[: len(wanted_splits)] == wanted_splits
    assert all(query < 0 for query, *_ in got_splits[len(wanted_splits) :])


def test_a_step_reads_what_its_inputs_hold_when_it_runs_again() -> None:
    """On a GPU it is a graph that was captured with other contents."""
    first, second = Batch(SMALL, [5, 300], [1, 1]), Batch(SMALL, [170, 135], [1, 1])
    table = torch.full((2, 50), 999_999, dtype=torch.int32, device=DEVICE)
    lengths = torch.empty(2, dtype=torch.int32, device=DEVICE)
    meta = replace(_on_device(first.meta), context_len=lengths, block_table=table)
    q, cache = torch.empty_like(first.q, device=DEVICE), torch.empty_like(first.cache)

    def load(batch: Batch) -> None:
        own = batch.meta.block_table
        table[:, : own.shape[1]] = own.to(DEVICE)
        lengths.copy_(batch.meta.context_len)
        q.copy_(batch.q)
        cache.copy_(batch.cache)

    load(first)
    run = _repeatable(lambda: attention(q, cache, meta, plan_splits(meta, SMALL), SMALL))
    for batch in second, first:
        load(batch)
        _close(run().cpu(), batch.wanted())


def _repeatable(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph, where there is a GPU."""
    if DEVICE == "cpu":
        return step
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
