"""Which program of the decode kernel reads which tokens: decided on the device, once per step."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta

SHORTEST = 64  # tokens of a split item: a tile of the decode kernel, which divides every item
PROGRAMS = 132 * 4  # that a batch is split into: several per multiprocessor of an H100 or H200


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Runs of tokens that one program per KV head reads, W of them, whatever the contexts are."""

    # int32 [5, W]: the run's sequence (-1: no run), its query's row in the batch, its first token,
    # the token after its last, and 1 if it is all of the sequence's context.
    items: Tensor
    first_item: Tensor  # int32 [S + 1]; sequence s has items first_item[s] to first_item[s + 1] - 1


def plan_splits(meta: BatchMeta, shape: AttentionShape) -> SplitPlan:
    """The runs of every sequence that computes one token; others have none, nor has padding.

    A run is 64 * 2^i tokens, the last of a sequence shorter; i is the least by which the batch's
    context makes at most `PROGRAMS / G` whole runs. A sequence's attention is summed run by run, so
    its last bits depend on i, and thereby on how much context the rest of the batch has.
    """
    num_sequences = meta.context_len.shape[0]
    whole_runs = -(-PROGRAMS // shape.num_kv_heads)
    num_items = num_sequences + whole_runs  # each sequence has at most one run that is not whole
    device = meta.context_len.device
    items = torch.empty(5, num_items, dtype=torch.int32, device=device)
    first_item = torch.empty(num_sequences + 1, dtype=torch.int32, device=device)
    sequences = max(16, triton.next_power_of_2(num_sequences))
    slots = triton.next_power_of_2(num_items)
    _plan[(1,)](
        meta.context_len,
        meta.query_start,
        items,
        first_item,
        num_sequences,
        num_items,
        whole_runs,
        SHORTEST=SHORTEST,
        SEQUENCES=sequences,
        SLOTS=slots,
    )
    return SplitPlan(items, first_item)


@triton.jit(do_not_specialize=["num_sequences", "num_items", "whole_runs"])
def _plan(
    context_len,
    query_start,
    items,
    first_item,
    num_sequences,
    num_items,
    whole_runs,
    SHORTEST: tl.constexpr,
    SEQUENCES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    sequence = tl.arange(0, SEQUENCES)
    exists = sequence < num_sequences
    query = tl.load(query_start + sequence, mask=exists, other=0)
    queries = tl.load(query_start + sequence + 1, mask=exists, other=0) - query
    context = tl.load(context_len + sequence, mask=exists, other=0)
    context = tl.where(queries == 1, context, 0)

    least = tl.cdiv(tl.sum(context), whole_runs)
    run = SHORTEST
    while run < least:
        run *= 2
    count = tl.cdiv(context, run)
    after = tl.cumsum(count)
    first = after - count
    tl.store(first_item, 0)
    tl.store(first_item + 1 + sequence, after, mask=exists)
    for i in range(tl.max(count)):
        item = items + first + i
        mine = i < count
        begin = i * run
        tl.store(item, sequence, mask=mine)
        tl.store(item + num_items, query, mask=mine)
        tl.store(item + num_items * 2, begin, mask=mine)
        tl.store(item + num_items * 3, tl.minimum(begin + run, context), mask=mine)
        tl.store(item + num_items * 4, (count == 1).to(tl.int32), mask=mine)
    slot = tl.arange(0, SLOTS)
    unused = (slot >= tl.sum(count)) & (slot < num_items)
    tl.store(items + slot, -1, mask=unused)
