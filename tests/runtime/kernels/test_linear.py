"""The CPU linear against float64, and its rows' independence of the batch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import random_weight
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.rounding import dequantize
from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import FullLinear, Kernels, Linear
from morphserve.runtime.kernels.cpu import CpuKernels, TorchKernels
from morphserve.runtime.kernels.reference import ReferenceKernels

EXAMPLES = settings(max_examples=25, derandomize=True, deadline=None)
QUANTIZED_EXAMPLES = settings(EXAMPLES, max_examples=80)  # of four kinds, ordered or not
DTYPES = [torch.float32, torch.bfloat16]
CPU = CpuKernels()


def _tolerance(x: Tensor, weight: Tensor) -> Tensor:
    """Rounding bound of a float32 sum in W >= 4 lanes: about K / 4 roundings of the magnitudes."""
    return (x.abs().double() @ weight.abs().double().T) * (x.shape[1] / 4 + 16) * 2.0**-24


def _assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert ((y.double() - exact).abs() <= _tolerance(x, weight) + 1e-6 * exact.abs()).all()


@st.composite
def quantized_weights(draw: st.DrawFn) -> QuantizedWeight:
    """Of any kind that is served: groups of a power of two, or whole rows of any even length."""
    group = draw(st.sampled_from([32, 64, 128, 0]))
    k = group * draw(st.integers(1, 20)) or 2 * draw(st.integers(1, 150))
    bits, zeros, ordered = draw(st.sampled_from([4, 8])), draw(st.booleans()), draw(st.booleans())
    return random_weight(draw(st.integers(1, 70)), k, group or k, bits, zeros, ordered)


@EXAMPLES
@given(
    m=st.integers(0, 120),
    n=st.integers(1, 70),
    k=st.integers(1, 300) | st.sampled_from([1024, 1056, 2100]),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
)
def test_full_linear_is_a_product(m: int, n: int, k: int, dtype: torch.dtype, biased: bool) -> None:
    x, weight = torch.randn(m, k), torch.randn(n, k).to(dtype)
    bias = torch.randn(n) if biased else None
    y = CPU.linear(x, FullLinear(CPU.pack_full(weight), bias))
    _assert_close(y, x, weight, bias)


@QUANTIZED_EXAMPLES
@given(m=st.integers(0, 120), weight=quantized_weights(), biased=st.booleans())
def test_quantised_linear_equals_the_full_one_bit_for_bit(
    m: int, weight: QuantizedWeight, biased: bool
) -> None:
    n, k = weight.codes.shape
    x, bias = torch.randn(m, k), torch.randn(n) if biased else None
    y = CPU.linear(x, replace(CPU.pack_quantized(weight), bias=bias))
    # Sums run along the columns as they are stored, so that is where bits can be compared.
    columns = torch.arange(k) if weight.input_order is None else weight.input_order
    stored = FullLinear(dequantize(weight)[:, columns].contiguous(), bias)
    assert torch.equal(y, CPU.linear(x[:, columns], stored))


@QUANTIZED_EXAMPLES
@given(m=st.integers(0, 9), weight=quantized_weights(), biased=st.booleans())
def test_every_kernel_computes_the_product_with_the_dequantised_weight(
    m: int, weight: QuantizedWeight, biased: bool
) -> None:
    n, k = weight.codes.shape
    x, bias = torch.randn(m, k), torch.randn(n) if biased else None
    kernels: list[Kernels] = [CPU, TorchKernels(), ReferenceKernels()]
    for each in kernels:
        y = each.linear(x, replace(each.pack_quantized(weight), bias=bias))
        _assert_close(y, x, dequantize(weight), bias)


@pytest.mark.parametrize("group", [16, 48, 96])
def test_groups_that_the_c_kernels_do_not_read_are_refused_with_a_way_out(group: int) -> None:
    with pytest.raises(ConfigError, match=f"groups of {group} inputs.*--group-size 32, 64 or 128"):
        CPU.pack_quantized(random_weight(8, 2 * group, group))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_full_precision_keeps_the_tensor(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 64).to(dtype)
    assert CPU.pack_full(weight).data_ptr() == weight.data_ptr()


def test_symmetric_int4_takes_half_a_byte_and_a_float32_per_group() -> None:
    packed = CPU.pack_quantized(random_weight(10, 256, 64))
    assert packed.codes.nbytes == 10 * 256 // 2
    assert packed.scales.nbytes == 10 * 256 // 64 * 4


def _linear(kind: str, n: int, k: int) -> Linear:
    match kind:
        case "int4" | "int4 with zeros":
            packed = CPU.pack_quantized(random_weight(n, k, 32, 4, zeros=kind != "int4"))
        case "int8 per row":
            packed = CPU.pack_quantized(random_weight(n, k, k, 8))
        case _:
            return FullLinear(torch.randn(n, k).to(getattr(torch, kind)), torch.randn(n))
    return replace(packed, bias=torch.randn(n))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4", "int4 with zeros", "int8 per row"])
@pytest.mark.parametrize("k", [96, 256, 1536])
def test_a_row_is_the_same_alone_and_in_any_batch(kind: str, k: int) -> None:
    linear = _linear(kind, 45, k)
    x = torch.randn(130, k)
    alone = torch.cat([CPU.linear(row[None], linear) for row in x])
    for rows in (2, 3, 4, 7, 17, 49, 130):
        assert torch.equal(CPU.linear(x[:rows], linear), alone[:rows])


def test_threads_do_not_change_a_bit() -> None:
    x, linear = torch.randn(70, 1056), FullLinear(torch.randn(333, 1056), None)
    one = CPU.linear(x, linear)
    torch.set_num_threads(3)
    try:
        assert torch.equal(CPU.linear(x, linear), one)
    finally:
        torch.set_num_threads(1)


def test_torch_fallback_computes_the_same_products() -> None:
    fallback, weight, bias = (
        TorchKernels(),
        random_weight(600, 128, 64, zeros=True),
        torch.randn(600),
    )
    x = torch.randn(5, 128)
    packed = replace(fallback.pack_quantized(weight), bias=bias)
    _assert_close(fallback.linear(x, packed), x, dequantize(weight), bias)
    full = torch.randn(30, 128)
    _assert_close(fallback.linear(x, FullLinear(full, None)), x, full, None)
