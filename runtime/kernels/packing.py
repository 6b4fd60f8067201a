"""Weights in the layout that the C linears read; linear.h describes it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import FullLinear, QuantizedLinear

STRIP = 32  # outputs side by side
CODE_RUN = 32  # rows of codes are filled up to a multiple of so many features


def pack_full(weight: Tensor) -> FullLinear:
    """A [N, K] weight, float32 or bfloat16, as [strips, words, STRIP] of 32 bits."""
    num_outputs, features = weight.shape
    per_word = 4 // weight.dtype.itemsize
    padded = F.pad(weight, (0, -features % per_word)).contiguous()
    words = _in_strips(padded.view(torch.int32)).view(weight.dtype)
    return FullLinear(words, None, num_outputs)


def pack_quantized(weight: QuantizedWeight) -> QuantizedLinear:
    """Codes as words, scales float16 and zeros uint8 as [strips, groups, STRIP]."""
    codes = F.pad(weight.codes, (0, -weight.codes.shape[1] % CODE_RUN))
    if weight.bits == 4:
        halves = codes.view(len(codes), -1, 2, 4)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
    order = None if weight.input_order is None else weight.input_order.int()
    return QuantizedLinear(
        bits=weight.bits,
        codes=_in_strips(codes.contiguous().view(torch.int32)),
        scales=_in_strips(weight.scales.to(torch.float16)),
        zeros=None if weight.zeros is None else _in_strips(weight.zeros),
        input_order=order,
        bias=None,
        num_outputs=len(weight.codes),
    )


def _in_strips(rows: Tensor) -> Tensor:
    """[N, items] to [strips, items, STRIP]; outputs past the last one are zeros."""
    padded = F.pad(rows, (0, 0, 0, -len(rows) % STRIP))
    return padded.view(-1, STRIP, rows.shape[1]).transpose(1, 2).contiguous()
