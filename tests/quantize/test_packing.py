"""Quantised weights in GPTQ's layout."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from morphserve.quantize.packing import fuse, pack, split, unpack
from morphserve.quantize.weights import QuantizedWeight


@st.composite
def any_weight(draw: st.DrawFn) -> QuantizedWeight:
    rows, groups = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    group_size = draw(st.sampled_from([8, 16, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    bits = draw(st.sampled_from([4, 8]))
    inputs = groups * group_size
    codes = torch.randint(0, 1 << bits, (8 * rows, inputs), generator=generator)
    zeros = torch.randint(0, 1 << bits, (8 * rows, groups), generator=generator)
    order = torch.randperm(inputs, generator=generator).view(groups, -1).sort().values.flatten()
    return QuantizedWeight(
        codes=codes.to(torch.uint8),
        scales=torch.rand(8 * rows, groups, generator=generator).half(),
        group_size=group_size,
        bits=bits,
        zeros=zeros.to(torch.uint8) if draw(st.booleans()) else None,
        input_order=order if draw(st.booleans()) else None,
    )


def assert_same(weight: QuantizedWeight, other: QuantizedWeight) -> None:
    assert (weight.group_size, weight.bits) == (other.group_size, other.bits)
    for name in ("codes", "scales", "zeros", "input_order"):
        a, b = getattr(weight, name), getattr(other, name)
        assert (a is None and b is None) or torch.equal(a, b)


@given(any_weight())
def test_packing_loses_nothing(weight: QuantizedWeight) -> None:
    assert_same(unpack(pack(weight), weight.bits), weight)


def test_a_word_holds_eight_inputs_of_one_output_low_nibble_first() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.uint8)
    scales = torch.tensor([[0.5]], dtype=torch.float16)
    tensors = pack(QuantizedWeight(codes, scales, 8))
    assert set(tensors) == {"qweight", "scales"}
    assert tensors["qweight"].shape == (1, 1)
    assert int(tensors["qweight"]) & 0xFFFFFFFF == 0xF7654321
    assert torch.equal(tensors["scales"], scales)


@given(any_weight())
def test_parts_fuse_to_the_whole(weight: QuantizedWeight) -> None:
    rows = len(weight.codes)
    assert_same(fuse(split(weight, [rows // 2, rows - rows // 2])), weight)
