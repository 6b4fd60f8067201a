"""Attention of sequences that compute one token: split over their context, then put together."""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta
from morphserve.runtime.kernels.cuda.splits import SplitPlan
from morphserve.runtime.kernels.cuda.tiles import load_pages, token_offsets, weigh

TILE_BYTES = 16384  # of K, and as much of V, that a program loads at once


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
    num_items = plan.items.shape[1]
    heads, groups, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    width = triton.next_power_of_2(dim)
    sums = torch.empty(num_items, heads, dim, dtype=torch.float32, device=q.device)
    tops = torch.empty(2, num_items, heads, dtype=torch.float32, device=q.device)
    _decode[(num_items, groups)](
        q,
        cache,
        meta.block_table,
        plan.items,
        out,
        sums,
        tops,
        q.stride(0),
        cache.stride(0),
        meta.block_table.stride(0),
        num_items,
        scale,
        GROUPS=groups,
        SHARE=heads // groups,
        ROWS=max(16, triton.next_power_of_2(heads // groups)),
        D=dim,
        WIDTH=width,
        B=shape.block_tokens,
        TILE=max(16, min(64, TILE_BYTES // (width * cache.itemsize))),
        ALIGNED=gcd(16, dim, cache.stride(0)),
        num_warps=4,
        num_stages=3,
    )
    _put_together[(meta.context_len.shape[0], heads)](
        plan.first_item,
        meta.query_start,
        sums,
        tops,
        out,
        num_items,
        HEADS=heads,
        D=dim,
        WIDTH=width,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["table_stride", "num_items"])
def _decode(
    q,
    cache,
    block_table,
    items,
    out,
    sums,
    tops,
    q_stride,
    page_stride,
    table_stride,
    num_items,
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
    """One run of tokens, one KV head and its SHARE query heads, as ROWS rows."""
    item, group = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(items + item)
    if sequence < 0:
        return
    query = tl.load(items + num_items + item).to(tl.int64)
    begin = tl.load(items + num_items * 2 + item)
    end = tl.load(items + num_items * 3 + item)
    is_whole = tl.load(items + num_items * 4 + item)

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
        pages = load_pages(table_row, first + TILE, end, TILE, B)  # one tile ahead
        seen = first + tl.arange(0, TILE) < end
        loaded = seen[:, None] & inside[None, :]
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
        result = (summed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + query * (GROUPS * SHARE * D) + place, result, mask=mine)
    else:
        slot = item.to(tl.int64) * (GROUPS * SHARE)
        tl.store(sums + slot * D + place, summed, mask=mine)
        tl.store(tops + slot + head, highest, mask=row < SHARE)
        tl.store(
            tops + num_items.to(tl.int64) * (GROUPS * SHARE) + slot + head, total, mask=row < SHARE
        )


@triton.jit(do_not_specialize=["num_items"])
def _put_together(
    first_item,
    query_start,
    sums,
    tops,
    out,
    num_items,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    RUNS: tl.constexpr = 16,
):
    """One head of one sequence: the weighted mean over its items, RUNS at a time."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    first, after = tl.load(first_item + sequence), tl.load(first_item + sequence + 1)
    query = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - query
    if (after - first == 1) | (queries != 1):
        return
    channel = tl.arange(0, WIDTH)
    inside = channel < D
    highest = float("-inf")
    total = 0.0
    summed = tl.zeros((WIDTH,), tl.float32)
    for begin in range(first, after, RUNS):
        item = begin + tl.arange(0, RUNS)
        exists = item < after
        slot = item.to(tl.int64) * HEADS + head
        top = tl.load(tops + slot, mask=exists, other=float("-inf"))
        raised = tl.maximum(highest, tl.max(top, 0))
        weight = tl.exp2(top - raised)
        kept = tl.exp2(highest - raised)
        total_of_run = tl.load(tops + num_items.to(tl.int64) * HEADS + slot, mask=exists, other=0.0)
        part = tl.load(
            sums + slot[:, None] * D + channel[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )
        total = total * kept + tl.sum(total_of_run * weight, 0)
        summed = summed * kept + tl.sum(part * weight[:, None], 0)
        highest = raised
    result = tl.where(total > 0, summed / total, 0.0).to(out.dtype.element_ty)
    tl.store(out + (query.to(tl.int64) * HEADS + head) * D + channel, result, mask=inside)
