"""Linears of CUDA: full precision, and quantised by the way that is faster for the batch."""

import torch
from torch import Tensor

from morphserve.runtime.kernels import FullLinear, Linear, QuantizedLinear
from morphserve.runtime.kernels.cuda.dequantise import dequantise
from morphserve.runtime.kernels.cuda.packing import TILE
from morphserve.runtime.kernels.cuda.quantized import multiply_codes
from morphserve.runtime.kernels.cuda.scratch import scratch_of

# Up to so many rows codes are multiplied as they are. Of a layer of 218 M weights on an H200:
# 128 rows take 59 us at the peak of its tensor cores. Dequantising takes 160 us (it reads 0.11 GB
# and writes 0.44 GB), to which cuBLAS adds 172 us for 256 rows, so that a kernel at 40 % of the
# peak is faster up to 256 rows; for 512 rows (284 us) it would have to reach 55 %.
MOST_ROWS_OF_CODES = 256


def linear(x: Tensor, weight: Linear, out: Tensor | None = None) -> Tensor:
    """x [M, K] times the weight, transposed, [M, N]; into `out` where given, rows contiguous.

    x has the bias's dtype, and that of the weight where it is not quantised.
    """
    if out is None:
        out = x.new_empty(len(x), weight.num_outputs)
    if len(x) == 0:
        return out
    if isinstance(weight, FullLinear):
        _product(x, weight.weight, weight.bias, out)
        return out
    if weight.input_order is not None:
        x = x.index_select(1, weight.input_order)
    if x.dtype == torch.bfloat16 and len(x) <= MOST_ROWS_OF_CODES:
        multiply_codes(x, weight, out)
    else:
        _multiply_dequantised(x, weight, out)
    return out


def _multiply_dequantised(x: Tensor, weight: QuantizedLinear, out: Tensor) -> None:
    """By slices of outputs that fit into the scratch memory."""
    num_inputs, num_outputs = x.shape[1], weight.num_outputs
    room = scratch_of(x.device).as_(x.dtype)
    num_tiles = -(-num_outputs // TILE)
    num_slices = -(-num_tiles // (len(room) // (TILE * num_inputs)))
    tiles = -(-num_tiles // num_slices)  # of each slice
    for tile in range(0, num_tiles, tiles):
        outputs = slice(tile * TILE, min((tile + tiles) * TILE, num_outputs))
        rows = outputs.stop - outputs.start
        part = room[: rows * num_inputs].view(rows, num_inputs)
        dequantise(weight, tile, part)
        bias = None if weight.bias is None else weight.bias[outputs]
        _product(x, part, bias, out[:, outputs])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x times weight [N, K], transposed, into `out`, which may be some columns of a matrix.

    cuBLAS writes to any distance between rows. Into a contiguous result cublasLt adds the bias
    itself; into columns torch copies it first, as what the product is added to.
    """
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
