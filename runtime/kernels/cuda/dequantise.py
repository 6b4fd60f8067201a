"""Quantised weights back as numbers, for cuBLAS."""

import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels import QuantizedLinear
from morphserve.runtime.kernels.cuda.codes import unpack
from morphserve.runtime.kernels.cuda.packing import TILE, steps_of


def dequantise(weight: QuantizedLinear, first_tile: int, out: Tensor) -> None:
    """Writes the outputs from a tile on into `out` [outputs, K], bfloat16 or float32, contiguous.

    Each is rounded once; the columns are in the order of the codes.
    """
    num_outputs, num_inputs = out.shape
    _, num_runs, _, words = weight.codes.shape
    _, group, step = steps_of(weight, num_inputs)
    _dequantise[(triton.cdiv(num_outputs, TILE), num_runs)](
        weight.codes,
        weight.scales,
        weight.zeros,
        out,
        first_tile,
        num_outputs,
        num_inputs,
        weight.scales.shape[1],
        num_runs,
        BITS=weight.bits,
        WORDS=words,
        GROUP=group,
        STEP=step,
        TILE=TILE,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["first_tile", "num_outputs", "num_groups", "num_runs"])
def _dequantise(
    codes,
    scales,
    zeros,  # or None
    out,
    first_tile,
    num_outputs,
    num_inputs,
    num_groups,
    num_runs,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale
    STEP: tl.constexpr,  # inputs of a run that are sure to share one
    TILE: tl.constexpr,
):
    """One program: a run of one tile."""
    PER_WORD: tl.constexpr = 16 // BITS
    tile, run = tl.program_id(0) + first_tile, tl.program_id(1)
    inner, word = tl.arange(0, TILE), tl.arange(0, WORDS)
    place = inner[:, None] * WORDS + word[None, :]
    parts = unpack(tl.load(codes + (tile * num_runs + run) * (TILE * WORDS) + place), BITS)
    output = tl.program_id(0) * TILE + inner
    for i in tl.static_range(PER_WORD):
        begin = (run * PER_WORD + i) * WORDS
        if i * WORDS % STEP == 0:
            group = tl.minimum(begin // GROUP, num_groups - 1)
            at = (tile * num_groups + group) * TILE + inner
            scale = tl.load(scales + at).to(tl.float32)[:, None]
            if zeros is not None:
                shift = ((1 << (BITS - 1)) - tl.load(zeros + at).to(tl.float32))[:, None]
        part = parts[i].to(tl.float32)
        if zeros is not None:
            part += shift
        column = begin + word
        mask = (output[:, None] < num_outputs) & (column[None, :] < num_inputs)
        to = out + output[:, None].to(tl.int64) * num_inputs + column[None, :]
        tl.store(to, (part * scale).to(out.dtype.element_ty), mask=mask)
