"""The next token of each row of logits, without sorting and without waiting: greedy, or drawn.

A drawn token lies by inverse CDF, in the order of ids, where its row's number is in the kept mass.
What is kept, and in which order it is decided, is `drawing.kept`'s. The launches, and how many,
depend on shapes and dtypes alone, and on `DeviceDraws.searches`; what each row needs is decided on
the device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels.cuda.likelihood import (
    BROKEN,
    NO_LOGIT,
    image_of,
    logit_of,
    rate_of,
    weigh,
)
from morphserve.runtime.kernels.cuda.narrowing import (
    NUM_MARKS,
    NUM_MASSES,
    NUM_PIVOTS,
    greatest_image,
    load_state,
    narrow,
    next_state,
)

BLOCK = 4096  # logits of a row that are summed together
NUM_PROGRAMS = 1024  # about what the largest GPU runs at once
NUM_WARPS = 8
MAX_REGISTERS = 128  # of a thread: a multiprocessor then has two programs of a search at once


@dataclass(frozen=True, slots=True)
class DeviceDraws:
    """How each row's token is drawn, as `Draw`; on the device, float32 [S] where not said."""

    temperature: Tensor  # 0: the likeliest token
    min_p: Tensor
    top_p: Tensor
    uniform: Tensor  # in [0, 1)
    top_k: Tensor  # int32 [S]; 0: all
    searches: int = 2  # the most of top_k and top_p that a row has; saves launches if less


def choose(logits: Tensor, draws: DeviceDraws | None, block: int = BLOCK) -> Tensor:
    """The token of each row [S] int32 on the device; -1: the row holds NaN or infinity.

    logits: bfloat16 or float32 [S, vocab], rows adjacent in themselves. draws: None: the likeliest
    token of each row, the lower id first among equals. block: a power of two. Nothing synchronises.
    """
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if not rows:
        return tokens
    num_blocks = triton.cdiv(vocab, block)
    padded = triton.next_power_of_2(num_blocks)
    found = torch.empty((rows, num_blocks), dtype=torch.int64, device=logits.device)
    find_greatest[(num_blocks, rows)](
        logits, logits.stride(0), vocab, found, num_blocks, BLOCK=block, num_warps=NUM_WARPS
    )
    if draws is None:
        take_greatest[(rows,)](found, tokens, num_blocks, BLOCKS=padded, num_warps=1)
        return tokens
    _draw(logits, draws, found, tokens, block)
    return tokens


def _draw(logits: Tensor, draws: DeviceDraws, found: Tensor, tokens: Tensor, block: int) -> None:
    (rows, vocab), num_blocks, device = logits.shape, found.shape[1], logits.device
    marks = torch.empty((2, rows, NUM_MARKS), dtype=torch.int32, device=device)
    masses = torch.empty((2, rows, NUM_MASSES), device=device)
    sums = torch.empty((2, rows, num_blocks, NUM_PIVOTS), device=device)
    shares = torch.empty((rows, num_blocks), device=device)
    counts = torch.empty((rows, num_blocks), dtype=torch.int32, device=device)
    per_program = triton.cdiv(rows * num_blocks, NUM_PROGRAMS)
    grid = (triton.cdiv(num_blocks, per_program), rows)
    # An image of bfloat16 has 16 bits and as many zeros.
    shift, passes = (16, 4) if logits.dtype == torch.bfloat16 else (0, 8)
    num_passes = passes * draws.searches
    common = {
        "SHIFT": shift,
        "BLOCK": block,
        "BLOCKS": triton.next_power_of_2(num_blocks),
        "num_warps": NUM_WARPS,
    }
    ask = (draws.temperature, draws.min_p, draws.top_p, draws.top_k)
    for i in range(num_passes + 1):
        old, new = 1 - i % 2, i % 2
        before = (found, marks[old], masses[old], sums[old], marks[new], masses[new])
        if i < num_passes:
            narrow[grid](
                logits, logits.stride(0), vocab, *ask, *before, sums[new], num_blocks, per_program,
                FIRST=i == 0, WIDTH=16 // logits.element_size(), maxnreg=MAX_REGISTERS, **common,
            )  # fmt: skip
        else:
            weigh_blocks[grid](
                logits, logits.stride(0), vocab, *ask, *before, shares, counts, num_blocks,
                per_program, FIRST=i == 0, **common,
            )  # fmt: skip
    pick[(rows,)](
        logits, logits.stride(0), vocab, draws.temperature, draws.min_p, draws.uniform, found,
        marks[new], masses[new], shares, counts, tokens, num_blocks, **common,
    )  # fmt: skip


@triton.jit
def find_greatest(logits, row_stride, vocab, found, num_blocks, BLOCK: tl.constexpr):
    """found: [S, num_blocks] image of the greatest logit, over what its id lacks of 2^31 - 1."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=0.0).to(tl.float32)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    image = tl.where(magnitude < 0x7F800000, image_of(x), BROKEN)
    image = tl.where(ids < vocab, image, NO_LOGIT)
    best = tl.max(image, 0)
    first = tl.min(tl.where(image == best, ids, 0x7FFFFFFF), 0)
    tl.store(found + row * num_blocks + block, (best.to(tl.int64) << 32) | (0x7FFFFFFF - first))


@triton.jit
def take_greatest(found, tokens, num_blocks, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    image, token = greatest_image(found + row * num_blocks, num_blocks, BLOCKS)
    tl.store(tokens + row, tl.where(image == BROKEN, -1, token))


@triton.jit(do_not_specialize=["per_program"])
def weigh_blocks(
    logits, row_stride, vocab, temperatures, min_ps, top_ps, top_ks, found,
    old_marks, old_masses, old_sums, marks, masses, shares, counts, num_blocks, per_program,
    FIRST: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of each block: the mass above the border (shares), and how many tokens are the border's."""
    first, row = tl.program_id(0) * per_program, tl.program_id(1).to(tl.int64)
    _, _, _, base, _, greatest, _, _ = next_state(
        vocab, row, temperatures, min_ps, top_ps, top_ks, found, old_marks, old_masses,
        old_sums, marks, masses, num_blocks, first, FIRST, SHIFT, BLOCKS,
    )  # fmt: skip
    temperature, min_p = tl.load(temperatures + row), tl.load(min_ps + row)
    if (temperature > 0) & (greatest != BROKEN >> SHIFT):
        rate, top = rate_of(temperature), logit_of(greatest << SHIFT)
        for block in range(first, tl.minimum(first + per_program, num_blocks)):
            ids = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=float("-inf"))
            x = x.to(tl.float32)
            image = image_of(x) >> SHIFT
            weight = tl.where(image > base, weigh(x, top, rate, min_p), 0.0)
            tl.store(shares + row * num_blocks + block, tl.sum(weight, 0))
            equal = tl.sum((image == base).to(tl.int32), 0)
            tl.store(counts + row * num_blocks + block, equal)


@triton.jit
def pick(
    logits, row_stride, vocab, temperatures, min_ps, uniforms, found, marks, masses, shares,
    counts, tokens, num_blocks,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The token whose mass, with all before it, is the first beyond a row's number."""
    row = tl.program_id(0).to(tl.int64)
    image, token = greatest_image(found + row * num_blocks, num_blocks, BLOCKS)
    temperature = tl.load(temperatures + row)
    token = tl.where(image == BROKEN, -1, token)
    if (temperature > 0) & (image != BROKEN):
        _, _, _, base, equals, greatest, _, _ = load_state(marks, masses, row)
        rate, min_p = rate_of(temperature), tl.load(min_ps + row)
        top = logit_of(greatest << SHIFT)
        at_border = weigh(logit_of(base << SHIFT), top, rate, min_p)
        block, kept, place = _pick_block(
            shares + row * num_blocks, counts + row * num_blocks, equals, at_border,
            tl.load(uniforms + row), num_blocks, BLOCKS,
        )  # fmt: skip
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=float("-inf"))
        x = x.to(tl.float32)
        images = image_of(x) >> SHIFT
        equal = (images == base).to(tl.int32)
        among = (images > base) | ((equal > 0) & (tl.cumsum(equal, 0) <= kept))
        weight = tl.where(among, weigh(x, top, rate, min_p), 0.0)
        beyond = (weight > 0) & (tl.cumsum(weight, 0) > place)
        last = tl.max(tl.where(weight > 0, ids, 0), 0)  # where rounding leaves none beyond
        token = tl.min(tl.where(beyond, ids, last), 0)
    tl.store(tokens + row, token)


@triton.jit
def _pick_block(shares, counts, equals, at_border, uniform, num_blocks, BLOCKS: tl.constexpr):
    """(block, how many of the border's tokens it keeps, place of the number in its mass)"""
    blocks = tl.arange(0, BLOCKS)
    inside = blocks < num_blocks
    count = tl.load(counts + blocks, mask=inside, other=0)
    kept = tl.minimum(tl.maximum(equals - (tl.cumsum(count, 0) - count), 0), count)
    mass = tl.load(shares + blocks, mask=inside, other=0.0) + kept * at_border
    before = tl.cumsum(mass, 0) - mass
    place = uniform * tl.sum(mass, 0)
    block = tl.max(tl.where((mass > 0) & (before <= place), blocks, 0), 0)
    chosen = blocks == block
    kept = tl.sum(tl.where(chosen, kept, 0), 0)
    return block, kept, place - tl.sum(tl.where(chosen, before, 0.0), 0)
