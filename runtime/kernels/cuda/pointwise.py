"""Norms and SiLU on CUDA: one launch and one pass over memory each, in float32, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_VECTOR = 8  # bfloat16 items of the widest load
_WARP = 32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `Kernels.rms_norm`."""
    return _normed(x, None, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `Kernels.add_rms_norm`: the norm is that of the sum as rounded to the residual's dtype."""
    return _normed(x, residual, None, weight, eps)


def add_rms_norm_rows(
    x: Tensor, residual: Tensor, rows: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """What `add_rms_norm` returns for these rows [R]: [R, hidden]; the residual stays as it is."""
    return _normed(x, residual, rows, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `Kernels.silu_mul`."""
    num_rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        block = min(4 * _WARP * _VECTOR, triton.next_power_of_2(width))
        grid = (num_rows, triton.cdiv(width, block))
        _silu_mul_kernel[grid](gate_up, out, WIDTH=width, BLOCK=block, num_warps=4)
    return out


def _normed(
    x: Tensor, residual: Tensor | None, rows: Tensor | None, weight: Tensor, eps: float
) -> Tensor:
    num_rows, hidden = len(x) if rows is None else len(rows), x.shape[1]
    out = torch.empty(num_rows, hidden, dtype=x.dtype, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(hidden)
        per_program = max(1, _WARP * _VECTOR // block)  # a row shorter than a warp's loads
        _norm_kernel[(triton.cdiv(num_rows, per_program),)](
            *(x, residual, rows, weight, out, num_rows, eps),
            HIDDEN=hidden,
            BLOCK=block,
            ROWS=per_program,
            num_warps=min(16, max(1, block // (_WARP * _VECTOR))),
        )
    return out


# Neither the number of rows nor where their list starts is worth compiling anew for.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows"])
def _norm_kernel(
    x,  # [M, HIDDEN]
    residual,  # [M, HIDDEN]; None: nothing is added
    rows,  # [num_rows]; None: all, and the sum is written back
    weight,  # [HIDDEN]
    out,  # [num_rows, HIDDEN]
    num_rows,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # of one program
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < HIDDEN)[None, :]
    source = row if rows is None else tl.load(rows + row, mask=row < num_rows, other=0)
    place = source.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    # Before the sum, whose threads wait for each other.
    gain = tl.load(weight + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        before = tl.load(residual + place, mask=inside, other=0.0)
        total = (before.to(tl.float32) + values).to(before.dtype)
        if rows is None:
            tl.store(residual + place, total, mask=inside)
        values = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / HIDDEN + eps)
    normed = values * scale[:, None] * gain[None, :]
    target = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(out + target, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_kernel(
    gate_up,  # [M, 2 * WIDTH]
    out,  # [M, WIDTH]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = gate_up + row * (2 * WIDTH) + column
    gate = tl.load(source, mask=column < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=column < WIDTH, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + column, gated.to(out.dtype.element_ty), mask=column < WIDTH)
