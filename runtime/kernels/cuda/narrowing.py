"""What top_k and top_p keep of rows of logits, without sorting: found from its border.

The border is the greatest logit at which so many tokens, or so much of the mass, is reached from
above. It is searched among the logits' images (likelihood.py): each pass over a row measures what
lies above some pivots, and leaves the part between two of them; so many passes suffice whatever
the logits are. Sums are taken block by block, in an order that no other row changes.

A row's state: `phase`; the border's image is at least `lo` and less than `hi`; `above` is what was
measured at `hi`, `goal` what is to be reached; `base` is top_k's border and `equals` how many of
its own tokens are kept. In the end `base` and `equals` tell what is kept: every token above `base`,
and so many of those equal to it, by id. All programs of a row work out its state from the pass
before; one writes it, into memory that none of them reads.
"""

import triton
import triton.language as tl

from morphserve.runtime.kernels.cuda.likelihood import (
    BROKEN,
    NO_LOGIT,
    image_of,
    logit_of,
    rate_of,
    weigh,
)

NUM_PIVOTS = 16  # each pass finds 4 bits of the border's image
NUM_MARKS, NUM_MASSES = 8, 4  # integers and floats of a state, padded to 16 bytes
_PIVOTS, _MARKS, _MASSES = (
    tl.constexpr(NUM_PIVOTS),
    tl.constexpr(NUM_MARKS),
    tl.constexpr(NUM_MASSES),
)
_DONE, _COUNTING, _WEIGHING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # phases
_UNKNOWN = tl.constexpr(-1.0)  # goal: the mass is not measured yet


@triton.jit(do_not_specialize=["per_program"])
def narrow(
    logits, row_stride, vocab, temperatures, min_ps, top_ps, top_ks, greatest_of,
    old_marks, old_masses, old_sums, marks, masses, sums, num_blocks, per_program,
    FIRST: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One pass of each row; a program has some blocks of one. sums: [S, num_blocks, NUM_PIVOTS]"""
    first, row = tl.program_id(0) * per_program, tl.program_id(1).to(tl.int64)
    phase, lo, hi, base, _, greatest, _, goal = next_state(
        vocab, row, temperatures, min_ps, top_ps, top_ks, greatest_of, old_marks, old_masses,
        old_sums, marks, masses, num_blocks, first, FIRST, SHIFT, BLOCKS,
    )  # fmt: skip
    if phase != _DONE:
        rate, min_p = rate_of(tl.load(temperatures + row)), tl.load(min_ps + row)
        top, stride = logit_of(greatest << SHIFT), _stride(lo, hi)
        # Each thread's logits of a line are adjacent: their sums stay with it.
        lines, columns = tl.arange(0, BLOCK // WIDTH), tl.arange(0, WIDTH)
        for block in range(first, tl.minimum(first + per_program, num_blocks)):
            ids = block * BLOCK + lines[:, None] * WIDTH + columns[None, :]
            x = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=float("-inf"))
            x = x.to(tl.float32)
            image = image_of(x) >> SHIFT
            weight = tl.where(phase == _WEIGHING, weigh(x, top, rate, min_p), 1.0)
            inside = tl.max(tl.max(((image > lo) & (image < hi)).to(tl.int32), 1), 0)
            if (inside > 0) | (goal < 0):
                reached = _above_pivots(image, weight, lo, stride, base, BLOCK // WIDTH)
            else:  # most blocks, once few tokens can be the border
                over = tl.sum(tl.sum(tl.where(image >= hi, weight, 0.0), 1), 0)
                reached = tl.zeros((_PIVOTS,), tl.float32) + over
            out = sums + (row * num_blocks + block) * _PIVOTS
            tl.store(out + tl.arange(0, _PIVOTS), reached)


@triton.jit
def next_state(
    vocab, row, temperatures, min_ps, top_ps, top_ks, greatest_of, old_marks, old_masses,
    old_sums, marks, masses, num_blocks, program,
    FIRST: tl.constexpr, SHIFT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """(phase, lo, hi, base, equals, greatest, above, goal), which program 0 writes"""
    temperature, min_p = tl.load(temperatures + row), tl.load(min_ps + row)
    top_p, top_k = tl.load(top_ps + row), tl.load(top_ks + row)
    if FIRST:
        found = greatest_of + row * num_blocks
        state = _first_state(temperature, top_p, top_k, vocab, found, num_blocks, SHIFT, BLOCKS)
        phase, lo, hi, base, equals, greatest, above, goal = state
    else:
        state = load_state(old_marks, old_masses, row)
        phase, lo, hi, base, equals, greatest, above, goal = state
        if phase != _DONE:
            totals = _totals(old_sums + row * num_blocks * _PIVOTS, num_blocks, BLOCKS)
            rate, top = rate_of(temperature), logit_of(greatest << SHIFT)
            if goal < 0:  # above the first pivot lies everything above top_k's border
                everything = tl.sum(tl.where(tl.arange(0, _PIVOTS) == 0, totals, 0.0), 0)
                at_base = weigh(logit_of(base << SHIFT), top, rate, min_p)
                goal = top_p * (everything + equals * at_base)
            lo, hi, above = _cut(lo, hi, base, above, goal, totals)
            if hi == lo + 1:
                if phase == _COUNTING:
                    base = lo
                    equals = (goal - above).to(tl.int32)
                    phase = tl.where(top_p < 1, _WEIGHING, _DONE)
                    lo = _least_border(greatest, temperature, top_p, vocab, base, SHIFT)
                    hi, above, goal = greatest + 1, 0.0, _UNKNOWN
                else:
                    few = (goal - above) / weigh(logit_of(lo << SHIFT), top, rate, min_p)
                    few = tl.ceil(tl.minimum(tl.maximum(few, 1.0), 1.0 * vocab))
                    few = few.to(tl.int32)
                    equals = tl.where(lo == base, tl.minimum(few, equals), few)
                    base, phase = lo, _DONE
    if program == 0:
        mark, mass = marks + row * _MARKS, masses + row * _MASSES
        tl.store(mark, phase)
        tl.store(mark + 1, lo)
        tl.store(mark + 2, hi)
        tl.store(mark + 3, base)
        tl.store(mark + 4, equals)
        tl.store(mark + 5, greatest)
        tl.store(mass, above)
        tl.store(mass + 1, goal)
    return phase, lo, hi, base, equals, greatest, above, goal


@triton.jit
def load_state(marks, masses, row):
    mark, mass = marks + row * _MARKS, masses + row * _MASSES
    phase, lo, hi = tl.load(mark), tl.load(mark + 1), tl.load(mark + 2)
    base, equals, greatest = tl.load(mark + 3), tl.load(mark + 4), tl.load(mark + 5)
    return phase, lo, hi, base, equals, greatest, tl.load(mass), tl.load(mass + 1)


@triton.jit
def greatest_image(found, num_blocks, BLOCKS: tl.constexpr):
    """(image of a row's greatest logit, its id) from what `find_greatest` gave for each block."""
    blocks = tl.arange(0, BLOCKS)
    best = tl.max(tl.load(found + blocks, mask=blocks < num_blocks, other=-(2**63)), 0)
    return (best >> 32).to(tl.int32), 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _first_state(
    temperature, top_p, top_k, vocab, found, num_blocks, SHIFT: tl.constexpr, BLOCKS: tl.constexpr
):
    image, _ = greatest_image(found, num_blocks, BLOCKS)
    greatest = image >> SHIFT
    narrows = tl.where(top_p < 1, _WEIGHING, _DONE)
    narrows = tl.where((top_k > 0) & (top_k < vocab), _COUNTING, narrows)
    phase = tl.where((temperature > 0) & (image != BROKEN), narrows, _DONE)
    base = tl.full((), NO_LOGIT >> SHIFT, tl.int32)
    least = _least_border(greatest, temperature, top_p, vocab, base, SHIFT)
    lo = tl.where(phase == _WEIGHING, least, base)
    goal = tl.where(phase == _WEIGHING, _UNKNOWN, top_k.to(tl.float32))
    zero = tl.full((), 0, tl.int32)
    return phase, lo, greatest + 1, base, zero, greatest, zero.to(tl.float32), goal


@triton.jit
def _least_border(greatest, temperature, top_p, vocab, base, SHIFT: tl.constexpr):
    """The image of a logit so small that all below it together hold less than half of 1 - top_p."""
    depth = tl.log(2.0 * vocab / tl.maximum(1 - top_p, 1e-9)) * temperature
    return tl.maximum(image_of(logit_of(greatest << SHIFT) - depth) >> SHIFT, base)


@triton.jit
def _stride(lo, hi):
    """Between pivots, which start at `lo`. In int64 as the range may exceed int32."""
    return ((hi.to(tl.int64) - lo + (_PIVOTS - 1)) // _PIVOTS).to(tl.int32)


@triton.jit
def _above_pivots(image, weight, lo, stride, base, LINES: tl.constexpr):
    """Weight at or above each pivot [NUM_PIVOTS]; the first pivot lies right above the base."""
    which = tl.arange(0, _PIVOTS)[:, None]
    sums = tl.zeros((_PIVOTS, LINES), tl.float32)
    pivot = base + 1
    for k in tl.static_range(_PIVOTS):
        over = tl.sum(tl.where(image >= pivot, weight, 0.0), 1)
        sums = tl.where(which == k, over[None, :], sums)
        pivot = stride + (pivot if k else lo)
    return tl.sum(sums, 1)


@triton.jit
def _totals(sums, num_blocks, BLOCKS: tl.constexpr):
    blocks, which = tl.arange(0, BLOCKS), tl.arange(0, _PIVOTS)
    places = blocks[:, None] * _PIVOTS + which[None, :]
    return tl.sum(tl.load(sums + places, mask=blocks[:, None] < num_blocks, other=0.0), 0)


@triton.jit
def _cut(lo, hi, base, above, goal, totals):
    """(lo, hi, above) of the part between the pivots where the goal is and is not reached"""
    which = tl.arange(0, _PIVOTS)
    pivots = tl.where(which == 0, base + 1, lo + _stride(lo, hi) * which)
    inside = (pivots > lo) & (pivots < hi)
    reached = totals >= goal
    low = tl.max(tl.where(inside & reached, pivots, lo), 0)
    high = tl.min(tl.where(inside & (totals < goal), pivots, hi), 0)
    measured = tl.max(tl.where(pivots == high, totals, 0.0), 0)
    return low, high, tl.where(high < hi, measured, above)
