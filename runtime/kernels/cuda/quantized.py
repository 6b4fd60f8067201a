"""Products of activations with codes that are unpacked in registers: W4A16 and W8A16."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels import QuantizedLinear
from morphserve.runtime.kernels.cuda.codes import unpack
from morphserve.runtime.kernels.cuda.packing import TILE, steps_of
from morphserve.runtime.kernels.cuda.scratch import scratch_of


@dataclass(frozen=True, slots=True)
class Block:
    """What one program computes, and how."""

    rows: int  # of activations
    outputs: int
    num_warps: int
    num_stages: int  # runs that are read ahead, and one
    per_processor: int  # programs that its registers and shared memory leave room for, on sm_90


# By what ptxas makes of them for sm_90, none with a spill. Weights are the left operand: they go
# from shared memory to registers, are unpacked there and multiplied from there. An H200 reads 30
# INT4 weights in a clock of a multiprocessor, which issues 4 instructions for 32 threads in it. A
# weight takes 2.5 of a thread with 16 rows and 4 warps for 128 outputs, 60 % of that time; 8 warps
# would take 3.3, since each does what is done once per run. 48 to 96 KiB of codes are on their way
# to a multiprocessor at any time; its share of 4 TB/s at a delay of 1 us is 30 KiB.
# Blocks read activations from the L2 cache, which gives 24 bytes in a clock: of 64 rows as many as
# of weights for 256 outputs, for 128 twice as many. 128 rows leave no registers for 256 outputs.
BLOCKS = (
    Block(rows=16, outputs=128, num_warps=4, num_stages=4, per_processor=4),
    Block(rows=32, outputs=128, num_warps=4, num_stages=4, per_processor=3),
    Block(rows=64, outputs=256, num_warps=8, num_stages=4, per_processor=1),
    Block(rows=128, outputs=128, num_warps=8, num_stages=3, per_processor=1),
)
# Several sums at once, of groups in one run, need more registers.
BLOCKS_OF_SMALL_GROUPS = (
    *BLOCKS[:2],
    Block(rows=64, outputs=128, num_warps=8, num_stages=4, per_processor=1),
)
LEAST_RUNS = 4  # that a program multiplies where several share a block's inputs
MULTIPROCESSORS = 132  # of an H200, where there is no device to ask


def multiply_codes(x: Tensor, weight: QuantizedLinear, out: Tensor) -> None:
    """Writes bfloat16 x [M, K], by the weight's columns, times the weight into `out` [M, N]."""
    num_rows, num_inputs = x.shape
    num_tiles, num_runs, _, words = weight.codes.shape
    run, group, step = steps_of(weight, num_inputs)
    blocks = BLOCKS if step == run else BLOCKS_OF_SMALL_GROUPS
    block = next((b for b in blocks if b.rows >= num_rows), blocks[-1])
    grid = (triton.cdiv(num_rows, block.rows), triton.cdiv(num_tiles * TILE, block.outputs))
    slots = block.per_processor * _multiprocessors(x.device)
    splits = max(1, min(slots // (grid[0] * grid[1]), num_runs // LEAST_RUNS))
    scratch = scratch_of(x.device)
    _multiply[(*grid, splits)](
        x,
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.bias,
        out,
        scratch.as_(torch.float32),
        scratch.arrived,
        num_rows,
        weight.num_outputs,
        num_inputs,
        weight.scales.shape[1],
        num_runs,
        x.stride(0),
        out.stride(0),
        splits,
        BITS=weight.bits,
        WORDS=words,
        GROUP=group,
        STEP=step,
        ROWS=block.rows,
        OUTPUTS=block.outputs,
        TILE=TILE,
        STAGES=block.num_stages,
        WHOLE_RUNS=num_inputs % run == 0,
        SPLIT=splits > 1,
        num_warps=block.num_warps,
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# What differs from batch to batch must not make Triton compile another kernel.
@triton.jit(do_not_specialize=["num_rows", "num_groups", "num_runs", "splits"])
def _multiply(
    x,  # [num_rows, num_inputs], rows x_stride apart
    codes,
    scales,
    zeros,  # or None
    bias,  # [num_outputs], or None
    out,  # [num_rows, num_outputs], rows out_stride apart
    partials,  # float32 [blocks, splits, OUTPUTS, ROWS]
    arrived,  # int32 [blocks], 0 before and after: programs of a block that are done
    num_rows,
    num_outputs,
    num_inputs,
    num_groups,
    num_runs,
    x_stride,
    out_stride,
    splits,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale
    STEP: tl.constexpr,  # inputs of a run that are sure to share one
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE_RUNS: tl.constexpr,  # the inputs fill the last run
    SPLIT: tl.constexpr,  # several programs share the inputs of a block
):
    """One program: the transposed product of a block over its share of the runs.

    The program of a block that is done last adds up all partial products, in order.
    """
    PER_WORD: tl.constexpr = 16 // BITS
    RUN: tl.constexpr = PER_WORD * WORDS
    split = tl.program_id(2)
    first, last = num_runs * split // splits, num_runs * (split + 1) // splits
    lane = tl.arange(0, OUTPUTS)
    output = tl.program_id(1) * OUTPUTS + lane
    tile = tl.minimum(output, num_outputs - 1) // TILE  # the last block may have one tile only
    inner = output % TILE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, WORDS)
    word_at = codes + (tile * num_runs * (TILE * WORDS) + inner * WORDS)[:, None] + word[None, :]
    input_at = x + row[None, :] * x_stride + word[:, None]
    scale_at = tile * num_groups * TILE + inner
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    group = tl.minimum(first * RUN // GROUP, num_groups - 1)
    next_scale = tl.load(scales + scale_at + group * TILE)
    if zeros is not None:
        next_zero = tl.load(zeros + scale_at + group * TILE)
    for run in tl.range(first, last, num_stages=STAGES):
        parts = unpack(tl.load(word_at + run * (TILE * WORDS)), BITS)
        for i in tl.static_range(PER_WORD):
            begin = run * RUN + i * WORDS
            if i * WORDS % STEP == 0:
                product = tl.zeros((OUTPUTS, ROWS), tl.float32)
                scale = next_scale  # asked for a step ahead of its use
                group = tl.minimum((begin + STEP) // GROUP, num_groups - 1)
                next_scale = tl.load(scales + scale_at + group * TILE)
                if zeros is not None:
                    shift = ((1 << (BITS - 1)) - next_zero.to(tl.int32)).to(tl.bfloat16)
                    next_zero = tl.load(zeros + scale_at + group * TILE)
            part = parts[i]
            if zeros is not None:
                part += shift[:, None]
            mask = row[None, :] < num_rows
            if not WHOLE_RUNS:
                mask = mask & (begin + word[:, None] < num_inputs)
            product = tl.dot(part, tl.load(input_at + begin, mask=mask, other=0.0), product)
            if (i + 1) * WORDS % STEP == 0:
                total += product * scale.to(tl.float32)[:, None]
    if SPLIT:
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        place = lane[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        partial_at = partials + block * splits * (OUTPUTS * ROWS) + place
        tl.store(partial_at + split * (OUTPUTS * ROWS), total)
        tl.debug_barrier()  # what all threads wrote comes before the arrival that one thread tells
        if tl.atomic_add(arrived + block, 1, sem="acq_rel") == splits - 1:
            tl.store(arrived + block, 0)
            total = tl.zeros((OUTPUTS, ROWS), tl.float32)
            for i in tl.range(splits, loop_unroll_factor=max(1, 64 // ROWS)):
                total += tl.load(partial_at + i * (OUTPUTS * ROWS), cache_modifier=".cg")
            _finish(total, out, bias, row, output, num_rows, num_outputs, out_stride)
    else:
        _finish(total, out, bias, row, output, num_rows, num_outputs, out_stride)


@triton.jit
def _finish(total, out, bias, row, output, num_rows, num_outputs, out_stride):
    """Stores [outputs, rows] in bfloat16, bias added, as [rows, outputs]."""
    if bias is not None:
        own = tl.load(bias + output, mask=output < num_outputs, other=0.0)
        total += own.to(tl.float32)[:, None]
    mask = (row[None, :] < num_rows) & (output[:, None] < num_outputs)
    tl.store(out + row[None, :] * out_stride + output[:, None], total.to(tl.bfloat16), mask=mask)
