"""Rows of the embedding on CUDA, in one launch; tokens may come from the step before."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from morphserve.runtime.kernels import FullLinear

_BLOCK = 1024  # items of a row to one program


def embed(tokens: Tensor, table: FullLinear) -> Tensor:
    """As `Kernels.embed`; ids int32 or int64, any below 0 (no token was drawn) counts as 0."""
    return _embedded(tokens, table, None)


def embed_beside_zeros(tokens: Tensor, table: FullLinear) -> tuple[Tensor, Tensor]:
    """`embed`, and zeros of the same shape."""
    shape = (len(tokens), table.weight.shape[1])
    zeros = torch.empty(shape, dtype=table.weight.dtype, device=tokens.device)
    return _embedded(tokens, table, zeros), zeros


def _embedded(tokens: Tensor, table: FullLinear, zeros: Tensor | None) -> Tensor:
    weight, hidden = table.weight, table.weight.shape[1]
    out = torch.empty(len(tokens), hidden, dtype=weight.dtype, device=tokens.device)
    if len(tokens):
        block = min(_BLOCK, triton.next_power_of_2(hidden))
        grid = (len(tokens), triton.cdiv(hidden, block))
        _embed_kernel[grid](tokens, weight, out, zeros, HIDDEN=hidden, BLOCK=block, num_warps=4)
    return out


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def _embed_kernel(
    tokens,  # [M]
    table,  # [vocab, HIDDEN]
    out,  # [M, HIDDEN]
    zeros,  # [M, HIDDEN]; None: not asked for
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.maximum(tl.load(tokens + row), 0).to(tl.int64)
    values = tl.load(table + token * HIDDEN + column, mask=column < HIDDEN, other=0.0)
    tl.store(out + row * HIDDEN + column, values, mask=column < HIDDEN)
    if zeros is not None:
        empty = tl.zeros((BLOCK,), zeros.dtype.element_ty)
        tl.store(zeros + row * HIDDEN + column, empty, mask=column < HIDDEN)
