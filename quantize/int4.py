"""INT4 weights: round to nearest, and the GPTQ v1 layout they have on disk."""

import torch
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.weights import Int4Weight

ZERO = 8  # the code of weight 0
_CODES_PER_WORD = 8  # 4-bit codes in an int32
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of the largest weight in a group
_FP16_MAX = 65504.0


def quantize_rtn(weight: Tensor, group_size: int) -> Int4Weight:
    """A [N, K] weight rounded to the nearest of 16 values per group of `group_size` inputs.

    Per row and group, scale = fp16(c * max|w| / 7) with the clip c (1.0 down to 0.75) that has
    the least squared error, and code = clamp(round(w / scale) + 8, 0, 15): w is rounded with the
    very scale that is stored.
    """
    num_rows, num_inputs = weight.shape
    if num_inputs % group_size:
        raise ConfigError(
            f"group size {group_size} does not divide the {num_inputs} inputs of a linear: "
            "choose one that does, for example 64 or 32"
        )
    groups = weight.float().view(num_rows, num_inputs // group_size, group_size)
    peak = groups.abs().amax(dim=-1)
    best_scales = _scales(peak, 1.0)
    best_codes = _round(groups, best_scales)
    best_error = _squared_error(groups, best_codes, best_scales)
    for clip in _CLIPS[1:]:
        scales = _scales(peak, clip)
        codes = _round(groups, scales)
        error = _squared_error(groups, codes, scales)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
    return Int4Weight(best_codes.to(torch.uint8).view(weight.shape), best_scales, group_size)


def _scales(peak: Tensor, clip: float) -> Tensor:
    return (peak * (clip / 7)).clamp(max=_FP16_MAX).half()


def _round(groups: Tensor, scales: Tensor) -> Tensor:
    """Codes as floats; a group whose scale rounds to 0 becomes 0."""
    divisors = torch.where(scales == 0, torch.inf, scales.float())
    return ((groups / divisors.unsqueeze(-1)).round() + ZERO).clamp(0, 15)


def _squared_error(groups: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return ((codes - ZERO) * scales.float().unsqueeze(-1) - groups).square().sum(dim=-1)


def dequantize(weight: Int4Weight) -> Tensor:
    """The [N, K] weight in float32."""
    num_rows, num_inputs = weight.codes.shape
    groups = weight.codes.view(num_rows, num_inputs // weight.group_size, weight.group_size)
    values = (groups.float() - ZERO) * weight.scales.float().unsqueeze(-1)
    return values.view(num_rows, num_inputs)


def pack_gptq(weight: Int4Weight) -> tuple[Tensor, Tensor]:
    """`qweight` int32 [K / 8, N] and `scales` float16 [K / group, N] of GPTQ v1.

    Bits 4i..4i+3 of word [r, n] hold the code of output n and input 8r + i.
    """
    num_rows, num_inputs = weight.codes.shape
    codes = weight.codes.t().reshape(num_inputs // _CODES_PER_WORD, _CODES_PER_WORD, num_rows)
    words = torch.zeros(num_inputs // _CODES_PER_WORD, num_rows, dtype=torch.int32)
    for i in range(_CODES_PER_WORD):
        words |= codes[:, i].int() << 4 * i
    return words, weight.scales.t().contiguous()


def unpack_gptq(qweight: Tensor, scales: Tensor) -> Int4Weight:
    """The weight that `pack_gptq` packed."""
    num_words, num_rows = qweight.shape
    num_inputs = num_words * _CODES_PER_WORD
    codes = torch.empty(num_words, _CODES_PER_WORD, num_rows, dtype=torch.uint8)
    for i in range(_CODES_PER_WORD):
        codes[:, i] = (qweight >> 4 * i) & 15
    return Int4Weight(
        codes=codes.view(num_inputs, num_rows).t().contiguous(),
        scales=scales.t().contiguous(),
        group_size=num_inputs // scales.shape[0],
    )


def fuse(parts: list[Int4Weight]) -> Int4Weight:
    """The weight whose outputs are those of the parts, in order."""
    return Int4Weight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        group_size=parts[0].group_size,
    )


def split(weight: Int4Weight, sizes: list[int]) -> list[Int4Weight]:
    """`weight` cut into parts of `sizes` outputs each."""
    codes = torch.split(weight.codes, sizes)
    scales = torch.split(weight.scales, sizes)
    return [Int4Weight(c, s, weight.group_size) for c, s in zip(codes, scales, strict=True)]
