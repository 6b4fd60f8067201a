"""Grids of few values per group of inputs, and rounding weights to the nearest of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.weights import QuantizedWeight

_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)  # of the range of a group
CHUNK = 1 << 20  # weights in work at a time: float32 copies of them stay in the cache
_FP16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class Grid:
    """The values a weight may take: `(code - zero) * scale`, one scale per row and group."""

    bits: int  # 4 or 8
    group_size: int  # inputs that share a scale; 0: all inputs of a row
    symmetric: bool = True  # zero is the middle code; otherwise each group has its own

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)


@dataclass(frozen=True, slots=True)
class Scales:
    """Of each row and group of a weight."""

    scale: Tensor  # float16 [N, groups]; may be negative, which turns the grid over
    zero: Tensor  # uint8 [N, groups]


def quantize_rtn(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> QuantizedWeight:
    """A [N, K] weight rounded to the nearest value of its group's grid.

    `importance` [K] weighs the squared errors that choose the scales (see `find_scales`).
    Weights are rounded with the very scales that are stored.
    """
    parts = []
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in _chunks(weight):
        groups = grouped(weight[rows].float(), grid)
        scales = find_scales(groups, grid, importance)
        codes[rows] = round_codes(groups, scales, grid).flatten(1)
        parts.append(scales)
    return quantized(codes, join(parts), grid)


def choose_scales(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Scales:
    """The scales that `quantize_rtn` chooses for a [N, K] weight."""
    return join(
        [
            find_scales(grouped(weight[rows].float(), grid), grid, importance)
            for rows in _chunks(weight)
        ]
    )


def join(parts: Sequence[Scales]) -> Scales:
    """Scales of rows that follow each other."""
    return Scales(
        torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts])
    )


def _chunks(weight: Tensor) -> Iterator[slice]:
    """Rows to be worked on together."""
    num_rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), num_rows):
        yield slice(start, start + num_rows)


def quantized(codes: Tensor, scales: Scales, grid: Grid) -> QuantizedWeight:
    """uint8 codes [N, K] and their scales as a weight."""
    return QuantizedWeight(
        codes=codes,
        scales=scales.scale,
        group_size=codes.shape[1] // scales.scale.shape[1],
        bits=grid.bits,
        zeros=None if grid.symmetric else scales.zero,
    )


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """[N, K] as [N, groups, group]. Raises ConfigError if groups do not fill K."""
    num_rows, num_inputs = weight.shape
    size = grid.group_size or num_inputs
    if num_inputs % size:
        raise ConfigError(
            f"group size {size} does not divide the {num_inputs} inputs of a linear: "
            "choose one that does, for example 64 or 32"
        )
    return weight.view(num_rows, num_inputs // size, size)


def find_scales(groups: Tensor, grid: Grid, importance: Tensor | None = None) -> Scales:
    """For [N, groups, group] weights, the clip of each group's range with the least squared error.

    Clips go from 1.0 (the range itself) down to 0.65. `importance` [K], the mean square of each
    input over calibration tokens, weighs the errors of a group's inputs.
    """
    weights = None if importance is None else importance.view(groups.shape[1:])
    best = _scales(groups, grid, 1.0)
    best_error = _squared_error(groups, best, grid, weights)
    for clip in _CLIPS[1:]:
        scales = _scales(groups, grid, clip)
        error = _squared_error(groups, scales, grid, weights)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = Scales(
            torch.where(better, scales.scale, best.scale),
            torch.where(better, scales.zero, best.zero),
        )
    return best


def _scales(groups: Tensor, grid: Grid, clip: float) -> Scales:
    if grid.symmetric:
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        # There is one code more below the middle than above: the larger end of the range takes it.
        end = torch.where(high > -low, -high, -low) * clip
        scale = (end / (grid.middle - 1)).clamp(-_FP16_MAX, _FP16_MAX).half()
        return Scales(scale, torch.full_like(scale, grid.middle, dtype=torch.uint8))
    low = groups.amin(dim=-1).clamp(max=0) * clip
    high = groups.amax(dim=-1).clamp(min=0) * clip
    scale = ((high - low) / grid.max_code).clamp(max=_FP16_MAX).half()
    zero = (-low / divisors(scale)).round().clamp(0, grid.max_code)
    return Scales(scale, zero.to(torch.uint8))


def divisors(scale: Tensor) -> Tensor:
    """float32 scales to divide by: a group whose scale rounds to 0 becomes 0."""
    return torch.where(scale == 0, torch.inf, scale.float())


def round_codes(groups: Tensor, scales: Scales, grid: Grid) -> Tensor:
    """Codes of [N, groups, group] weights, as floats."""
    steps = (groups / divisors(scales.scale).unsqueeze(-1)).round()
    return (steps + scales.zero.unsqueeze(-1)).clamp(0, grid.max_code)


def _squared_error(groups: Tensor, scales: Scales, grid: Grid, weights: Tensor | None) -> Tensor:
    """[N, groups]"""
    steps = round_codes(groups, scales, grid) - scales.zero.unsqueeze(-1)
    squares = (steps * scales.scale.float().unsqueeze(-1) - groups).square()
    return (squares if weights is None else squares * weights).sum(dim=-1)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The [N, K] weight in float32, its inputs in the model's order."""
    num_rows, num_inputs = weight.codes.shape
    groups = weight.codes.view(num_rows, -1, weight.group_size).float()
    zeros = weight.middle if weight.zeros is None else weight.zeros.float().unsqueeze(-1)
    values = ((groups - zeros) * weight.scales.float().unsqueeze(-1)).view(num_rows, num_inputs)
    if weight.input_order is None:
        return values
    ordered = torch.empty_like(values)
    ordered[:, weight.input_order] = values
    return ordered
