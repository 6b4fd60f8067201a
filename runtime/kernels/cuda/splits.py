"""Which program of the decode kernel reads which tokens: decided on the device, once per step."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta

SHORTEST = 64  # tokens of a run; the decode kernel's tiles divide it
PROGRAMS = 132 * 4  # that a batch is cut into: several per multiprocessor of an H100 or H200


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The runs of tokens of a batch, each read by one program per KV head."""

    # int32 [5, W], a column per run: its sequence (-1: no run), its query's row in the batch, its
    # first token, the token after its last, and 1 if it is the whole context of its sequence.
    runs: Tensor
    # int32 [3, C], a column per sequence of several runs, which stand next to each other in `runs`:
    # its query's row (-1: no sequence), its first run, and the run after its last.
    splits: Tensor


def plan_splits(meta: BatchMeta, shape: AttentionShape) -> SplitPlan:
    """Runs that hold each token of each sequence with one query once; an empty one for padding.

    A run is 64 * 2^i tokens, the last of a sequence shorter; i is the least with which the batch
    has at most PROGRAMS / G times as many tokens. A sequence's attention is summed run by run, so
    its last bits depend on i, and thereby on how much context the rest of the batch has.
    """
    num_sequences, device = meta.context_len.shape[0], meta.context_len.device
    full_runs = -(-PROGRAMS // shape.num_kv_heads)  # at most; one more per sequence is shorter
    num_runs = num_sequences + full_runs
    num_splits = min(num_sequences, full_runs)  # each has a full run
    width = max(16, triton.next_power_of_2(num_sequences))
    runs = torch.empty(5, num_runs, dtype=torch.int32, device=device)
    splits = torch.empty(3, num_splits, dtype=torch.int32, device=device)
    _plan[(1,)](
        meta.context_len,
        meta.query_start,
        runs,
        splits,
        num_sequences,
        num_runs,
        num_splits,
        full_runs,
        SHORTEST=SHORTEST,
        SEQUENCES=width,
        RUNS=triton.next_power_of_2(width + full_runs),  # at least num_runs, and few values
        num_warps=max(1, min(16, width // 128)),
    )
    return SplitPlan(runs, splits)


@triton.jit(do_not_specialize=["num_sequences", "num_runs", "num_splits", "full_runs"])
def _plan(
    context_len,
    query_start,
    runs,
    splits,
    num_sequences,
    num_runs,
    num_splits,
    full_runs,
    SHORTEST: tl.constexpr,
    SEQUENCES: tl.constexpr,
    RUNS: tl.constexpr,
):
    sequence = tl.arange(0, SEQUENCES)
    exists = sequence < num_sequences
    query = tl.load(query_start + sequence, mask=exists, other=0)
    after_query = tl.load(query_start + sequence + 1, mask=exists, other=0)
    context = tl.load(context_len + sequence, mask=exists, other=0)
    decodes = after_query - query == 1
    context = tl.where(decodes, context, 0)

    least = tl.cdiv(tl.sum(context), full_runs)
    length = SHORTEST
    while length < least:
        length *= 2
    count = tl.where(decodes, tl.maximum(tl.cdiv(context, length), 1), 0)
    after = tl.cumsum(count)
    first = after - count
    for i in range(tl.max(count)):
        run = runs + first + i
        mine = i < count
        begin = i * length
        tl.store(run, sequence, mask=mine)
        tl.store(run + num_runs, query, mask=mine)
        tl.store(run + num_runs * 2, begin, mask=mine)
        tl.store(run + num_runs * 3, tl.minimum(begin + length, context), mask=mine)
        tl.store(run + num_runs * 4, (count == 1).to(tl.int32), mask=mine)

    is_split = count > 1
    split = splits + tl.cumsum(is_split.to(tl.int32)) - 1
    tl.store(split, query, mask=is_split)
    tl.store(split + num_splits, first, mask=is_split)
    tl.store(split + num_splits * 2, after, mask=is_split)

    slot = tl.arange(0, RUNS)
    tl.store(runs + slot, -1, mask=(slot >= tl.sum(count)) & (slot < num_runs))
    tl.store(splits + slot, -1, mask=(slot >= tl.sum(is_split.to(tl.int32))) & (slot < num_splits))
