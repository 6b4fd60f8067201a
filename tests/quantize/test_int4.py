"""INT4 rounding and the GPTQ layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphserve.configs.errors import ConfigError
from morphserve.quantize.int4 import (
    dequantize,
    fuse,
    pack_gptq,
    quantize_rtn,
    split,
    unpack_gptq,
)
from morphserve.quantize.weights import Int4Weight


@st.composite
def any_weight(draw: st.DrawFn) -> Int4Weight:
    rows, groups = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    group_size = draw(st.sampled_from([8, 16, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(0, 16, (rows, groups * group_size), generator=generator)
    scales = torch.rand(rows, groups, generator=generator).half()
    return Int4Weight(codes.to(torch.uint8), scales, group_size)


@given(any_weight())
def test_packing_loses_nothing(weight: Int4Weight) -> None:
    unpacked = unpack_gptq(*pack_gptq(weight))
    assert torch.equal(unpacked.codes, weight.codes)
    assert torch.equal(unpacked.scales, weight.scales)
    assert unpacked.group_size == weight.group_size


def test_a_word_holds_eight_inputs_of_one_output_low_nibble_first() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.uint8)
    scales = torch.tensor([[0.5]], dtype=torch.float16)
    qweight, packed_scales = pack_gptq(Int4Weight(codes, scales, 8))
    assert qweight.shape == (1, 1)
    assert int(qweight) & 0xFFFFFFFF == 0xF7654321
    assert torch.equal(packed_scales, scales)


@given(any_weight())
def test_parts_fuse_to_the_whole(weight: Int4Weight) -> None:
    rows = len(weight.codes)
    whole = fuse(split(weight, [rows // 2, rows - rows // 2]))
    assert torch.equal(whole.codes, weight.codes)
    assert torch.equal(whole.scales, weight.scales)


@given(st.integers(0, 2**32), st.floats(1e-3, 1e3), st.sampled_from([torch.float, torch.bfloat16]))
def test_rounding_is_no_worse_than_the_plain_scale(
    seed: int, size: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(4, 128, generator=generator) * size).to(dtype)
    rounded = quantize_rtn(weight, 64)
    groups = weight.float().view(4, 2, 64)
    scales = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    plain = (groups / scales).round().clamp(-8, 7) * scales
    error = (dequantize(rounded).view(4, 2, 64) - groups).square().sum(-1)
    assert torch.all(error <= (plain - groups).square().sum(-1))
    assert int(rounded.codes.max()) <= 15


def test_weights_on_the_grid_survive() -> None:
    weight = torch.arange(-7, 9).clamp(max=7).float().repeat(2, 4) * 0.25
    assert torch.equal(dequantize(quantize_rtn(weight, 16)), weight)


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e30])
def test_extreme_groups_stay_finite(value: float) -> None:
    rounded = quantize_rtn(torch.full((1, 8), value), 8)
    assert bool(dequantize(rounded).isfinite().all())
    assert value > 1 or bool((dequantize(rounded).abs() <= 1e-8).all())


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="group size 48 does not divide the 64 inputs"):
        quantize_rtn(torch.zeros(2, 64), 48)
