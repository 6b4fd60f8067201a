"""Rotation of q and k, and k and v into the pages, on CUDA in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta, QKNorm

_ITEMS = 512  # of each half of the heads of one program: two warps' widest loads in bfloat16


def rope_write_kv(
    qkv: Tensor,
    cache: Tensor,
    meta: BatchMeta,
    shape: AttentionShape,
    cos_sin: Tensor,
    norm: QKNorm | None,
) -> Tensor:
    """As `Kernels.rope_write_kv`; pages are K [G, B, D], then V [G, B, D].

    A token whose page is -1 is padding: nothing of it is written to the cache.
    """
    num_tokens, half = len(qkv), shape.head_dim // 2
    size = (num_tokens, shape.num_heads, shape.head_dim)
    q = torch.empty(size, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        block = triton.next_power_of_2(half)
        heads = max(1, _ITEMS // block)  # of one program
        num_heads = shape.num_heads + 2 * shape.num_kv_heads
        _rope_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
            *(qkv, q, cache, meta.positions, meta.token_page, meta.token_slot, cos_sin),
            *((None, None) if norm is None else (norm.q, norm.k)),
            *(cache.stride(0), shape.norm_eps),
            Q_HEADS=shape.num_heads,
            KV_HEADS=shape.num_kv_heads,
            HALF=half,
            TOKENS=shape.block_tokens,
            HEADS=heads,
            BLOCK=block,
            num_warps=2,
        )
    return q


# Where a batch's numbers start changes nothing: else each other place would be compiled for anew.
@triton.jit(do_not_specialize_on_alignment=["positions", "token_page", "token_slot"])
def _rope_kernel(
    qkv,  # [M, (Q_HEADS + 2 * KV_HEADS) * 2 * HALF]
    q,  # [M, Q_HEADS, 2 * HALF]
    cache,  # [pages, 2 * KV_HEADS * TOKENS * 2 * HALF], rows page_items apart
    positions,  # [M]
    token_page,  # [M]
    token_slot,  # [M]
    cos_sin,  # [max_position, 2 * HALF]
    q_weight,  # [2 * HALF], None: q and k are not normed
    k_weight,
    page_items,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    TOKENS: tl.constexpr,  # of a block
    HEADS: tl.constexpr,  # of one program
    BLOCK: tl.constexpr,  # HALF and what is masked
):
    token = tl.program_id(0).to(tl.int64)
    page = tl.load(token_page + token).to(tl.int64)
    slot = tl.load(token_slot + token)
    position = tl.load(positions + token).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    known = (head < Q_HEADS + 2 * KV_HEADS) & (i < HALF)
    is_q, is_v = head < Q_HEADS, head >= Q_HEADS + KV_HEADS

    place = head * (2 * HALF) + i
    source = qkv + token * ((Q_HEADS + 2 * KV_HEADS) * 2 * HALF) + place
    first = tl.load(source, mask=known, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=known, other=0.0).to(tl.float32)
    # Of all heads the same, but loaded for each: so a thread gets what belongs to its channels.
    column = head * 0 + i
    turn = cos_sin + position * (2 * HALF) + column
    cos = tl.load(turn, mask=known, other=0.0)
    sin = tl.load(turn + HALF, mask=known, other=0.0)
    x, y = first, second
    if q_weight is not None:
        square = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
        scale = tl.rsqrt(square + eps)[:, None]
        x *= scale * _gain(q_weight + column, k_weight + column, is_q, known)
        y *= scale * _gain(q_weight + HALF + column, k_weight + HALF + column, is_q, known)
    left = tl.where(is_v, first, x * cos - y * sin)
    right = tl.where(is_v, second, y * cos + x * sin)

    q_row = q + token * (Q_HEADS * 2 * HALF) + place
    tl.store(q_row, left.to(q.dtype.element_ty), mask=is_q & known)
    tl.store(q_row + HALF, right.to(q.dtype.element_ty), mask=is_q & known)
    # K's heads, then V's, lie in the page as they do in qkv. Padding has none.
    kv_row = cache + page * page_items + ((head - Q_HEADS) * TOKENS + slot) * (2 * HALF) + i
    first_written = tl.where(page < 0, Q_HEADS + 2 * KV_HEADS, Q_HEADS)
    written = (head >= first_written) & known
    tl.store(kv_row, left.to(cache.dtype.element_ty), mask=written)
    tl.store(kv_row + HALF, right.to(cache.dtype.element_ty), mask=written)


@triton.jit
def _gain(q_weight, k_weight, is_q, known):
    """Of the norm of each head, from pointers [HEADS, BLOCK] to both norms' weights."""
    of_q = tl.load(q_weight, mask=known & is_q, other=0.0)
    of_k = tl.load(k_weight, mask=known & (is_q == 0), other=0.0)
    return tl.where(is_q, of_q, of_k).to(tl.float32)
