"""A packed step, unpacked on the device into tensors that never move."""

import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels import BatchMeta

_TILE = 256  # tokens and blocks of a sequence to one program


def unpack(
    packed: Tensor,
    chosen: Tensor,
    tokens: Tensor,
    rows: Tensor,
    meta: BatchMeta,
    block_tokens: int,
    *,
    num_tokens: int,
    num_seqs: int,
    num_rows: int,
    longest: int,
) -> None:
    """Writes a step, and padding up to as many sequences as `meta` has, in one launch.

    packed: int32, one after another: first token of each sequence and the end [num_seqs + 1],
    tokens in the cache after the step [num_seqs], first block of each sequence and the end
    [num_seqs + 1], rows whose logits are asked for [num_rows], token ids [num_tokens], blocks. May
    be pinned host memory, which the kernel reads where it lies: a copy would wait behind whatever
    the copy engine is at. A token id -1 - r stands for `chosen[r]`.
    longest: most tokens or blocks of one sequence.
    A padded sequence has one token at position 0, a context of 0 tokens and page -1; padded rows
    are 0.
    """
    num_padded = meta.context_len.shape[0]
    grid = (num_padded, max(triton.cdiv(longest, _TILE), 1))
    _unpack_kernel[grid](
        *(packed, chosen, tokens, rows, meta.positions, meta.token_page, meta.token_slot),
        *(meta.query_start, meta.context_len, meta.block_table, meta.block_table.stride(0)),
        *(num_tokens, num_seqs, num_rows, num_padded),
        BLOCK_TOKENS=block_tokens,
        TILE=_TILE,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_tokens", "num_seqs", "num_rows", "num_padded"])
def _unpack_kernel(
    packed,
    chosen,
    tokens,  # [M]
    rows,  # [num_padded]
    positions,  # [M]
    token_page,  # [M]
    token_slot,  # [M]
    query_start,  # [num_padded + 1]
    context_len,  # [num_padded]
    block_table,  # [num_padded, table_stride]
    table_stride,
    num_tokens,
    num_seqs,
    num_rows,
    num_padded,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
):
    s = tl.program_id(0)
    tile = tl.program_id(1)
    contexts = packed + num_seqs + 1
    first_blocks = contexts + num_seqs
    asked = first_blocks + num_seqs + 1
    ids = asked + num_rows
    blocks = ids + num_tokens
    if tile == 0:
        row = tl.load(asked + s, mask=s < num_rows, other=0)
        tl.store(rows + s, row)
        # Each of the padded sequences has one token, after all others.
        tl.store(query_start + num_padded, num_tokens + num_padded - num_seqs)
    if s < num_seqs:
        start = tl.load(packed + s)
        count = tl.load(packed + s + 1) - start
        end = tl.load(contexts + s)
        block_start = tl.load(first_blocks + s)
        num_blocks = tl.load(first_blocks + s + 1) - block_start
        if tile == 0:
            tl.store(query_start + s, start)
            tl.store(context_len + s, end)
        i = tile * TILE + tl.arange(0, TILE)
        block = tl.load(blocks + block_start + i, mask=i < num_blocks, other=0)
        tl.store(block_table + s.to(tl.int64) * table_stride + i, block, mask=i < num_blocks)
        inside = i < count
        token = tl.load(ids + start + i, mask=inside, other=0)
        late = inside & (token < 0)
        token = tl.where(late, tl.load(chosen - 1 - token, mask=late, other=0), token)
        position = end - count + i
        page = tl.load(blocks + block_start + position // BLOCK_TOKENS, mask=inside, other=0)
        tl.store(tokens + start + i, token, mask=inside)
        tl.store(positions + start + i, position, mask=inside)
        tl.store(token_page + start + i, page, mask=inside)
        tl.store(token_slot + start + i, position % BLOCK_TOKENS, mask=inside)
    elif tile == 0:
        at = num_tokens + s - num_seqs
        tl.store(query_start + s, at)
        tl.store(context_len + s, 0)
        tl.store(tokens + at, 0)
        tl.store(positions + at, 0)
        tl.store(token_page + at, -1)
        tl.store(token_slot + at, 0)
