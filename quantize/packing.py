"""Quantised weights in GPTQ's tensor layout, and several fused to one.

Bits b*i .. b*i + b - 1 of word [r, n] of `qweight` hold the code of output n and input r*c + i,
where b is the number of bits and c = 32 / b the codes in a word. `qzeros`, only of asymmetric
weights, holds zeros in the same way along the outputs: as they are (GPTQ v2), not less one.
`g_idx`, only where inputs are not in order, holds the group of each input.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from morphserve.quantize.weights import QuantizedWeight


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """`qweight` int32 [K / c, N], `scales` float16 [K / group, N], and, only where the weight needs
    them, `qzeros` int32 [K / group, N / c] and `g_idx` int32 [K]."""
    codes = weight.codes
    num_groups = weight.scales.shape[1]
    tensors = {"scales": weight.scales.t().contiguous()}
    if weight.input_order is not None:
        place = torch.argsort(weight.input_order)
        codes = codes[:, place]
        tensors["g_idx"] = (place // weight.group_size).int()
    tensors["qweight"] = pack_codes(codes.t(), weight.bits)
    if weight.zeros is not None:
        assert weight.zeros.shape == (len(codes), num_groups)
        tensors["qzeros"] = pack_codes(weight.zeros, weight.bits).t().contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor], bits: int) -> QuantizedWeight:
    """The weight that `pack` packed."""
    codes = unpack_codes(tensors["qweight"], bits).t()
    scales = tensors["scales"].t().contiguous()
    order = None
    if "g_idx" in tensors:
        order = torch.argsort(tensors["g_idx"], stable=True)
        codes = codes[:, order]
    zeros = tensors.get("qzeros")
    return QuantizedWeight(
        codes=codes.contiguous(),
        scales=scales,
        group_size=codes.shape[1] // scales.shape[1],
        bits=bits,
        zeros=None if zeros is None else unpack_codes(zeros.t(), bits),
        input_order=order,
    )


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [A, B] to int32 [A / c, B]: c neighbours of the first dimension to a word."""
    per_word = 32 // bits
    parts = codes.reshape(-1, per_word, codes.shape[1])
    words = torch.zeros(parts.shape[0], parts.shape[2], dtype=torch.int32)
    for i in range(per_word):
        words |= parts[:, i].int() << bits * i
    return words


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """int32 [A / c, B] to uint8 [A, B]."""
    per_word = 32 // bits
    codes = torch.empty(words.shape[0], per_word, words.shape[1], dtype=torch.uint8)
    for i in range(per_word):
        codes[:, i] = (words >> bits * i) & (1 << bits) - 1
    return codes.flatten(0, 1)


def fuse(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The weight whose outputs are those of the parts, in order; all share one order of inputs."""
    first = parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    assert len(zeros) in (0, len(parts))
    return QuantizedWeight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        group_size=first.group_size,
        bits=first.bits,
        zeros=torch.cat(zeros) if zeros else None,
        input_order=first.input_order,
    )


def split(weight: QuantizedWeight, sizes: list[int]) -> list[QuantizedWeight]:
    """`weight` cut into parts of `sizes` outputs each."""
    zeros = [None] * len(sizes) if weight.zeros is None else torch.split(weight.zeros, sizes)
    return [
        QuantizedWeight(c, s, weight.group_size, weight.bits, z, weight.input_order)
        for c, s, z in zip(
            torch.split(weight.codes, sizes), torch.split(weight.scales, sizes), zeros, strict=True
        )
    ]
