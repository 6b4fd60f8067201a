"""Every layout is decoded as its description says, by writers of whole numbers, bit by bit."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morphserve.quantize.formats.awq import read_awq
from morphserve.quantize.formats.compressed_tensors import read_compressed_tensors
from morphserve.quantize.formats.gptq import read_gptq
from morphserve.quantize.formats.stored import Format, to_weight
from morphserve.quantize.rounding import dequantize

GROUPS, GROUP, OUTPUTS = 3, 32, 16
INPUTS = GROUPS * GROUP
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@st.composite
def linears(draw: st.DrawFn) -> dict[str, Any]:
    """Codes, zeros and scales, random to the extremes of their ranges."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    bits = draw(st.sampled_from([4, 8]))
    scales = torch.randn(OUTPUTS, GROUPS, generator=random).half()  # negative ones too
    order = torch.randperm(INPUTS, generator=random)
    return {
        "bits": bits,
        "codes": torch.randint(1 << bits, (OUTPUTS, INPUTS), generator=random),
        "zeros": torch.randint(1 << bits, (OUTPUTS, GROUPS), generator=random),
        "scales": scales,
        "group_of": torch.argsort(order) // GROUP,
    }


def words(
    rows: Tensor, bits: int, order: Sequence[int] = range(8), less_one: bool = False
) -> Tensor:
    """int32 [A, B / c] of [A, B]: code `order[i]` of each c neighbours in bits b*i and on."""
    per_word = 32 // bits
    places = order if per_word == 8 else range(per_word)
    ones = sum(1 << bits * i for i in range(per_word)) if less_one else 0
    table = []
    for row in rows.tolist():
        table.append([])
        for start in range(0, len(row), per_word):
            word = sum(row[start + place] << bits * i for i, place in enumerate(places)) - ones
            unsigned = word % 2**32
            table[-1].append(unsigned - 2**32 if unsigned >= 2**31 else unsigned)
    return torch.tensor(table, dtype=torch.int32)


def meant(linear: dict[str, Any], group_of: Tensor, zeros: Tensor) -> Tensor:
    """The weight by the formula all formats share."""
    steps = linear["codes"] - zeros[:, group_of]
    return steps.float() * linear["scales"][:, group_of].float()


def decoded(stored_as: Format, tensors: dict[str, Tensor]) -> Tensor:
    parts = stored_as.parts(OUTPUTS, INPUTS)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: part.shape for name, part in parts.items() if name in tensors
    }
    return dequantize(to_weight(stored_as.decode(tensors), stored_as.grid))


IN_ORDER = torch.arange(INPUTS) // GROUP


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@given(linears())
@settings(max_examples=20, deadline=None)
def test_gptq_with_zeros_and_inputs_out_of_order(version: str, linear: dict[str, Any]) -> None:
    """Zeros of 0 and of the largest code included: version 1 borrows across a word's codes."""
    bits = linear["bits"]
    config = {
        "bits": bits,
        "group_size": GROUP,
        "sym": False,
        "desc_act": True,
        "checkpoint_format": version,
    }
    tensors = {
        "qweight": words(linear["codes"], bits).t().contiguous(),
        "qzeros": words(linear["zeros"].t(), bits, less_one=version == "gptq"),
        "scales": linear["scales"].t().contiguous(),
        "g_idx": linear["group_of"].int(),
    }
    found = decoded(read_gptq(config), tensors)
    assert torch.equal(found, meant(linear, linear["group_of"], linear["zeros"]))


@given(linears())
@settings(max_examples=20, deadline=None)
def test_gptq_symmetric_in_groups_or_rows(linear: dict[str, Any]) -> None:
    bits, middle = linear["bits"], 1 << linear["bits"] - 1
    scales = linear["scales"][:, :1]
    config = {"bits": bits, "group_size": -1, "sym": True, "desc_act": False}
    tensors = {
        "qweight": words(linear["codes"], bits).t().contiguous(),
        "qzeros": words(torch.full((1, OUTPUTS), middle), bits, less_one=True),
        "scales": scales.t().contiguous(),
    }
    expected = (linear["codes"] - middle).float() * scales.float()
    assert torch.equal(decoded(read_gptq(config), tensors), expected)


@given(linears().filter(lambda linear: linear["bits"] == 4))
@settings(max_examples=20, deadline=None)
def test_awq(linear: dict[str, Any]) -> None:
    config = {"w_bit": 4, "q_group_size": GROUP, "zero_point": True, "version": "GEMM"}
    tensors = {
        "qweight": words(linear["codes"].t(), 4, AWQ_ORDER),
        "qzeros": words(linear["zeros"].t(), 4, AWQ_ORDER),
        "scales": linear["scales"].t().contiguous(),
    }
    assert torch.equal(decoded(read_awq(config), tensors), meant(linear, IN_ORDER, linear["zeros"]))


@pytest.mark.parametrize("ordered", [False, True])
@given(linears())
@settings(max_examples=20, deadline=None)
def test_compressed_tensors(ordered: bool, linear: dict[str, Any]) -> None:
    bits = linear["bits"]
    weights = {"num_bits": bits, "strategy": "group", "group_size": GROUP, "symmetric": False}
    weights["actorder"] = "group" if ordered else None
    config = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}
    group_of = linear["group_of"] if ordered else IN_ORDER
    tensors = {
        "weight_packed": words(linear["codes"], bits),
        "weight_zero_point": words(linear["zeros"].t(), bits).t().contiguous(),
        "weight_scale": linear["scales"],
        "weight_shape": torch.tensor([OUTPUTS, INPUTS]),
        "weight_g_idx": group_of.int() if ordered else torch.full((INPUTS,), -1).int(),
    }
    assert torch.equal(
        decoded(read_compressed_tensors(config), tensors), meant(linear, group_of, linear["zeros"])
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_float_become_the_nearest_float16(dtype: torch.dtype) -> None:
    scales = torch.tensor([[0.0123, -0.5, 3e-5]]).repeat(OUTPUTS, 1).to(dtype)
    tensors = {
        "qweight": torch.zeros(INPUTS // 8, OUTPUTS, dtype=torch.int32),
        "qzeros": torch.full((GROUPS, OUTPUTS // 8), 0x77777777, dtype=torch.int32),
        "scales": scales.t().contiguous(),
    }
    stored_as = read_gptq({"bits": 4, "group_size": GROUP, "sym": True})
    weight = to_weight(stored_as.decode(tensors), stored_as.grid)
    assert torch.equal(weight.scales, scales.half())
