"""Attention of sequences that compute several tokens at once: causal, over the same pages."""

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta
from morphserve.runtime.kernels.cuda.tiles import Tiling, load_pages, token_offsets, weigh


def prefill(
    q: Tensor,
    cache: Tensor,
    meta: BatchMeta,
    shape: AttentionShape,
    scale: float,
    out: Tensor,
) -> None:
    """Writes the rows of `out` [M, H, D] of sequences with more than one query."""
    num_tokens, num_sequences = q.shape[0], meta.context_len.shape[0]
    groups, dim = shape.num_kv_heads, shape.head_dim
    share = shape.num_heads // groups
    tiling = choose(dim, cache.itemsize)
    queries = tiling.rows // share
    _prefill[(num_tokens // queries + num_sequences, groups)](
        q,
        cache,
        meta.block_table,
        meta.query_start,
        meta.context_len,
        out,
        q.stride(0),
        cache.stride(0),
        meta.block_table.stride(0),
        num_sequences,
        scale,
        GROUPS=groups,
        SHARE=share,
        QUERIES=queries,
        ROWS=tiling.rows,
        D=dim,
        WIDTH=tiling.width,
        B=shape.block_tokens,
        TILE=tiling.tile,
        ALIGNED=gcd(16, dim, cache.stride(0)),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def choose(dim: int, itemsize: int) -> Tiling:
    """The largest tiling that spills no register in bfloat16, compiled for A100, L4 and H200.

    It fits the 99 KiB of shared memory of an L4. 128 rows to a tile of K and V keep the tensor
    cores ahead of the second-level cache: 32 bytes per cycle and multiprocessor at their peak.
    """
    width = max(16, triton.next_power_of_2(dim))
    if itemsize == 4:  # no tensor cores: the products' operands take registers
        return Tiling(width, 32, 16, warps=4 if width <= 64 else 8, stages=2)
    if width <= 128:
        return Tiling(width, 128, 64, warps=8, stages=3)
    return Tiling(width, 64, 32, warps=8, stages=2)


@triton.jit(do_not_specialize=["table_stride", "num_sequences"])
def _prefill(
    q,
    cache,
    block_table,
    query_start,
    context_len,
    out,
    q_stride,
    page_stride,
    table_stride,
    num_sequences,
    scale,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """QUERIES tokens of one sequence, one KV head and its SHARE query heads: a row for each pair.

    Sequence s has the programs from query_start[s] // QUERIES + s on, as many as it may need.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest contexts first
    group = tl.program_id(1)
    sequence = _find(query_start, num_sequences, program, QUERIES)
    start = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - start
    first_query = (program - start // QUERIES - sequence) * QUERIES
    if (num_queries < 2) | (first_query >= num_queries):
        return
    context = tl.load(context_len + sequence)
    position = context - num_queries + first_query  # of the program's first token
    end = tl.minimum(position + QUERIES, context)

    row, channel = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    query, head = row // SHARE, group * SHARE + row % SHARE
    exists = (query < QUERIES) & (first_query + query < num_queries)
    inside = channel < D
    mine = exists[:, None] & inside[None, :]
    token = (start + first_query).to(tl.int64) + query
    place = (head * D)[:, None] + channel[None, :]
    queries = tl.load(q + (token * q_stride)[:, None] + place, mask=mine, other=0.0)

    keys = cache + group * (B * D) + channel[None, :]
    values = keys + GROUPS * B * D
    table_row = block_table + sequence.to(tl.int64) * table_stride
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    causal = (position + 1) // TILE * TILE  # the tiles before it are seen whole by each row
    pages = load_pages(table_row, 0, end, TILE, B)
    for first in range(0, causal, TILE):
        offsets = token_offsets(pages, first, page_stride, TILE, B, D, ALIGNED)[:, None]
        pages = load_pages(table_row, first + TILE, end, TILE, B)
        if D == WIDTH:
            k, v = tl.load(keys + offsets), tl.load(values + offsets)
        else:
            k = tl.load(keys + offsets, mask=inside[None, :], other=0.0)
            v = tl.load(values + offsets, mask=inside[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        weights, highest, kept = weigh(scores, highest, scale)
        total = total * kept + tl.sum(weights, 1)
        summed = summed * kept[:, None]
        summed = tl.dot(weights.to(v.dtype), v, summed, input_precision="ieee")
    for first in range(causal, end, TILE):
        offsets = token_offsets(pages, first, page_stride, TILE, B, D, ALIGNED)[:, None]
        pages = load_pages(table_row, first + TILE, end, TILE, B)
        other = first + tl.arange(0, TILE)
        loaded = (other < end)[:, None] & inside[None, :]
        k = tl.load(keys + offsets, mask=loaded, other=0.0)
        v = tl.load(values + offsets, mask=loaded, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        seen = other[None, :] <= (position + query)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        weights, highest, kept = weigh(scores, highest, scale)
        total = total * kept + tl.sum(weights, 1)
        summed = summed * kept[:, None]
        summed = tl.dot(weights.to(v.dtype), v, summed, input_precision="ieee")

    result = (summed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (token * (GROUPS * SHARE * D))[:, None] + place, result, mask=mine)


@triton.jit
def _find(query_start, num_sequences, program, QUERIES: tl.constexpr):
    """The last sequence whose programs begin at or before this one."""
    low, high = 0, num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= program:
            low = middle
        else:
            high = middle
    return low
