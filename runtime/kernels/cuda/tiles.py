"""What both attention kernels do with a tile of tokens: find it in its pages, and weigh it."""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a program goes through its tokens."""

    width: int  # D, up to the next power of two
    rows: int  # pairs of query and head
    tile: int  # tokens at a time, a power of two of at least 16
    warps: int
    stages: int  # a tile's loads are started stages - 1 tiles ahead


@triton.jit
def load_pages(table_row, first, end, TILE: tl.constexpr, B: tl.constexpr):
    """Pages of the tile of tokens from `first` on, which TILE divides; 0 from token `end` on.

    For loops to call a tile ahead: loads of pages in the iteration that reads K and V through them
    would be pipelined, too, and halve how far ahead these are.
    """
    tl.static_assert(TILE % B == 0 or B % TILE == 0)
    block = table_row + first // B
    pages = (tl.load(block, mask=first < end, other=0),)
    for i in tl.static_range(1, TILE // B):
        page = tl.load(block + i, mask=first + i * B < end, other=0)
        pages = pages + (page,)  # type: ignore[assignment]
    return pages


@triton.jit
def token_offsets(
    pages,
    first,
    page_stride,
    TILE: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Where K of the tile's tokens lies from a head's K in page 0: int64 [TILE].

    ALIGNED divides D and page_stride: what the compiler can't prove, and wide loads need.
    """
    row = tl.arange(0, TILE)
    if TILE <= B:
        slot = first % B + row
        offsets = (slot * D).to(tl.int64) + pages[0].to(tl.int64) * page_stride
    else:
        offsets = (row % B * D).to(tl.int64)
        for i in tl.static_range(TILE // B):
            offsets += tl.where(row // B == i, pages[i].to(tl.int64) * page_stride, 0)
    return tl.multiple_of(offsets, ALIGNED)


@triton.jit
def weigh(scores, highest, scale):
    """Softmax weights 2^(scale * scores) of [M, TILE], relative to their rows' highest so far.

    `highest` [M] is that of former tiles, scaled. Returns the weights, the new highest, and the
    factor [M] that makes of sums under the former highest sums under the new one.
    """
    raised = tl.maximum(highest, tl.max(scores, 1) * scale)
    return tl.exp2(scores * scale - raised[:, None]), raised, tl.exp2(highest - raised)
