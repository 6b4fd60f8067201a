"""Attention of sequences that compute one token: run by run of their context, then put together."""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta
from morphserve.runtime.kernels.cuda.splits import SplitPlan
from morphserve.runtime.kernels.cuda.tiles import Tiling, load_pages, token_offsets, weigh


def decode(
    q: Tensor,
    cache: Tensor,
    meta: BatchMeta,
    plan: SplitPlan,
    shape: AttentionShape,
    scale: float,
    out: Tensor,
) -> None:
    """Writes the rows of `out` [M, H, D] of sequences with one query; zeros without context."""
    num_runs, num_splits = plan.runs.shape[1], plan.splits.shape[1]
    heads, groups, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    tiling = choose(heads // groups, dim, cache.itemsize)
    sums = torch.empty(num_runs, heads, dim, dtype=torch.float32, device=q.device)
    tops = torch.empty(2, num_runs, heads, dtype=torch.float32, device=q.device)
    _attend_run[(num_runs, groups)](
        q,
        cache,
        meta.block_table,
        plan.runs,
        out,
        sums,
        tops,
        q.stride(0),
        cache.stride(0),
        meta.block_table.stride(0),
        num_runs,
        scale,
        GROUPS=groups,
        SHARE=heads // groups,
        ROWS=tiling.rows,
        D=dim,
        WIDTH=tiling.width,
        B=shape.block_tokens,
        TILE=tiling.tile,
        ALIGNED=gcd(16, dim, cache.stride(0)),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    _join_runs[(num_splits, heads)](
        plan.splits,
        sums,
        tops,
        out,
        num_runs,
        num_splits,
        HEADS=heads,
        D=dim,
        WIDTH=tiling.width,
        num_warps=4,
    )


def choose(share: int, dim: int, itemsize: int) -> Tiling:
    """The tiling for `share` query heads per KV head.

    K and V of a tile are 32 KiB: compiled for 8B shapes and an H200, three programs share a
    multiprocessor, each with one or two tiles on their way. 25 KB per multiprocessor would keep its
    memory busy (4.8 TB/s for 700 ns); the rest hides how long a program takes over a tile.
    """
    width = max(16, triton.next_power_of_2(dim))
    tile = max(16, min(64, 16384 // (width * itemsize)))
    return Tiling(width, max(16, triton.next_power_of_2(share)), tile, warps=4, stages=3)


@triton.jit(do_not_specialize=["table_stride", "num_runs"])
def _attend_run(
    q,
    cache,
    block_table,
    runs,
    out,
    sums,
    tops,
    q_stride,
    page_stride,
    table_stride,
    num_runs,
    scale,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One run, one KV head, and its SHARE query heads as rows.

    Writes the result if the run is the whole context. Else sums of values [W, H, D], not divided by
    those of their weights, and in `tops` [2, W, H] the highest scores and the sums of weights.
    """
    run, group = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(runs + run)
    query = tl.load(runs + num_runs + run).to(tl.int64)
    begin = tl.load(runs + num_runs * 2 + run)
    end = tl.load(runs + num_runs * 3 + run)
    is_whole = tl.load(runs + num_runs * 4 + run)
    if sequence < 0:
        return

    row, channel = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = group * SHARE + row
    inside = channel < D
    mine = (row < SHARE)[:, None] & inside[None, :]
    place = head[:, None] * D + channel[None, :]
    queries = tl.load(q + query * q_stride + place, mask=mine, other=0.0)

    keys = cache + group * (B * D) + channel[None, :]
    values = keys + GROUPS * B * D
    table_row = block_table + sequence.to(tl.int64) * table_stride
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight_sums = tl.zeros((ROWS, TILE), tl.float32)  # summed over tokens once, at the end
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    pages = load_pages(table_row, begin, end, TILE, B)
    for first in range(begin, end, TILE):
        offsets = token_offsets(pages, first, page_stride, TILE, B, D, ALIGNED)[:, None]
        pages = load_pages(table_row, first + TILE, end, TILE, B)
        seen = first + tl.arange(0, TILE) < end
        loaded = seen[:, None] & inside[None, :]  # V, too: what was never written may be a NaN
        k = tl.load(keys + offsets, mask=loaded, other=0.0)
        v = tl.load(values + offsets, mask=loaded, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        weights, highest, kept = weigh(scores, highest, scale)
        weight_sums = weight_sums * kept[:, None] + weights
        summed = summed * kept[:, None]
        summed = tl.dot(weights.to(v.dtype), v, summed, input_precision="ieee")

    total = tl.sum(weight_sums, 1)
    if is_whole != 0:
        mean = summed / tl.where(begin < end, total, 1.0)[:, None]
        result = out + query * (GROUPS * SHARE * D) + place
        tl.store(result, mean.to(out.dtype.element_ty), mask=mine)
    else:
        slot = run.to(tl.int64) * (GROUPS * SHARE)
        top = tops + slot + head
        tl.store(sums + slot * D + place, summed, mask=mine)
        tl.store(top, highest, mask=row < SHARE)
        tl.store(top + num_runs.to(tl.int64) * (GROUPS * SHARE), total, mask=row < SHARE)


@triton.jit(do_not_specialize=["num_runs", "num_splits"])
def _join_runs(
    splits,
    sums,
    tops,
    out,
    num_runs,
    num_splits,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    RUNS: tl.constexpr = 16,
):
    """One head of one sequence of several runs, RUNS at a time."""
    split, head = tl.program_id(0), tl.program_id(1)
    query = tl.load(splits + split).to(tl.int64)
    begin = tl.load(splits + num_splits + split)
    end = tl.load(splits + num_splits * 2 + split)
    if query < 0:
        return
    channel = tl.arange(0, WIDTH)
    inside = channel < D
    highest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    summed = tl.zeros((WIDTH,), tl.float32)
    for first in range(begin, end, RUNS):
        run = first + tl.arange(0, RUNS)
        exists = run < end
        slot = run.to(tl.int64) * HEADS + head
        loaded = exists[:, None] & inside[None, :]
        part = tl.load(sums + slot[:, None] * D + channel[None, :], mask=loaded, other=0.0)
        top = tl.load(tops + slot, mask=exists, other=float("-inf"))
        weight_sum = tl.load(tops + num_runs.to(tl.int64) * HEADS + slot, mask=exists, other=0.0)
        raised = tl.maximum(highest, tl.max(top, 0))
        weight, kept = tl.exp2(top - raised), tl.exp2(highest - raised)
        total = total * kept + tl.sum(weight_sum * weight, 0)
        summed = summed * kept + tl.sum(part * weight[:, None], 0)
        highest = raised
    result = out + (query * HEADS + head) * D + channel
    tl.store(result, (summed / total).to(out.dtype.element_ty), mask=inside)
