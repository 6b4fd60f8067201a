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


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e30])
def test_extreme_groups_stay_finite(value: float) -> None:
    rounded = quantize_rtn(torch.full((1, 8), value), Grid(4, 8))
    assert bool(dequantize(rounded).isfinite().all())
    assert value > 1 or bool((dequantize(rounded).abs() <= 1e-8).all())


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="group size 48 does not divide the 64 inputs"):
        quantize_rtn(torch.zeros(2, 64), Grid(4, 48))
