"""Rounding to the nearest value of a grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphserve.configs.errors import ConfigError
from morphserve.quantize.rounding import Grid, dequantize, quantize_rtn


@given(st.integers(0, 2**32), st.floats(1e-3, 1e3), st.sampled_from([torch.float, torch.bfloat16]))
def test_rounding_is_no_worse_than_the_plain_scale(
    seed: int, size: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(4, 128, generator=generator) * size).to(dtype)
    rounded = quantize_rtn(weight, Grid(4, 64))
    groups = weight.float().view(4, 2, 64)
    scales = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    plain = (groups / scales).round().clamp(-8, 7) * scales
    error = (dequantize(rounded).view(4, 2, 64) - groups).square().sum(-1)
    assert torch.all(error <= (plain - groups).square().sum(-1))
    assert int(rounded.codes.max()) <= 15


def test_weights_on_the_grid_survive() -> None:
    weight = torch.arange(-7, 9).clamp(max=7).float().repeat(2, 4) * 0.25
    assert torch.equal(dequantize(quantize_rtn(weight, Grid(4, 16))), weight)


@given(st.integers(0, 2**32), st.sampled_from([Grid(4, 32), Grid(4, 32, False), Grid(8, 0)]))
def test_rounding_goes_to_the_nearest_value_of_the_grid(seed: int, grid: Grid) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    weight += torch.arange(4).unsqueeze(1) - 2  # groups whose range lies to one side of 0
    rounded = quantize_rtn(weight, grid)
    groups = weight.view(4, -1, rounded.group_size)
    zeros = rounded.zeros if rounded.zeros is not None else torch.full_like(rounded.scales, 1)
    middle = 0 if rounded.zeros is not None else grid.middle - 1
    values = (torch.arange(grid.max_code + 1) - middle - zeros.float().unsqueeze(-1)) * (
        rounded.scales.float().unsqueeze(-1)
    )
    distances = (groups.unsqueeze(-1) - values.unsqueeze(2)).abs()
    error = (dequantize(rounded).view_as(groups) - groups).abs()
    torch.testing.assert_close(error, distances.amin(-1), atol=1e-6, rtol=1e-5)


def test_the_larger_end_of_a_symmetric_range_has_the_code_more() -> None:
    weight = torch.tensor([[-8.0, 7.0, 3.0, 0.0], [8.0, -7.0, 5.0, 1.0]])
    rounded = quantize_rtn(weight, Grid(4, 4))
    assert (rounded.scales.squeeze() > 0).tolist() == [True, False]
    assert bool(((dequantize(rounded) - weight).abs() <= 0.5).all())


def test_importance_moves_errors_to_inputs_that_matter_less() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(32)
    importance[:4] = 100
    plain, weighed = (
        (dequantize(quantize_rtn(weight, Grid(4, 32), by)) - weight).square().sum(0)
        for by in (None, importance)
    )
    assert float(weighed[:4].sum()) < 0.8 * float(plain[:4].sum())
    assert float((weighed * importance).sum()) < float((plain * importance).sum())


def test_rows_in_many_chunks_are_rounded_each_alone() -> None:
    weight = torch.randn(70_000, 64, generator=torch.Generator().manual_seed(0))
    rounded = quantize_rtn(weight, Grid(4, 32, symmetric=False))
    assert rounded.zeros is not None
    for rows in (slice(0, 3), slice(65_535, 65_538), slice(69_997, 70_000)):
        alone = quantize_rtn(weight[rows], Grid(4, 32, symmetric=False))
        assert torch.equal(alone.codes, rounded.codes[rows])
        assert torch.equal(alone.scales, rounded.scales[rows])
        assert alone.zeros is not None and torch.equal(alone.zeros, rounded.zeros[rows])


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e30])
def test_extreme_groups_stay_finite(value: float) -> None:
    rounded = quantize_rtn(torch.full((1, 8), value), Grid(4, 8))
    assert bool(dequantize(rounded).isfinite().all())
    assert value > 1 or bool((dequantize(rounded).abs() <= 1e-8).all())


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="group size 48 does not divide the 64 inputs"):
        quantize_rtn(torch.zeros(2, 64), Grid(4, 48))
