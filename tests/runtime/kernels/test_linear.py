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
from morphserve.runtime.kernels import Kernels, Linear
from morphserve.runtime.kernels.cpu import CpuKernels
from morphserve.runtime.kernels.portable import TorchKernels
from morphserve.runtime.kernels.reference import ReferenceKernels

EXAMPLES = settings(max_examples=25)
QUANTIZED_EXAMPLES = settings(EXAMPLES, max_examples=80)  # of four kinds, ordered or not
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["float32", "bfloat16", "int4", "int4 with zeros", "int8 per row"]
CPU = CpuKernels()


def _assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the rounding bound of a chain of float32 sums: one rounding per feature."""
    x, weight = x.double(), weight.double()
    exact = x @ weight.T + (0 if bias is None else bias.double())
    bound = (x.abs() @ weight.abs().T) * (x.shape[1] + 16) * 2.0**-24
    assert ((y.double() - exact).abs() <= bound + 1e-6 * exact.abs()).all()


def _to_bytes(x: Tensor, group: int) -> Tensor:
    """Activations as they meet codes: rounded to 127 steps of the largest of 64 (or 32)."""
    group = 32 if group < 64 and group != x.shape[1] else 64
    pieces = x.split(group, dim=1)
    steps = [piece.abs().amax(dim=1, keepdim=True) / 127 for piece in pieces]
    rounded = [(p / s).nan_to_num().round() * s for p, s in zip(pieces, steps, strict=True)]
    return torch.cat(rounded, dim=1)


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
    y = CPU.linear(x, replace(CPU.pack_full(weight), bias=bias))
    _assert_close(y, x.to(dtype), weight, bias)


@QUANTIZED_EXAMPLES
@given(m=st.integers(0, 120), weight=quantized_weights(), biased=st.booleans())
def test_quantised_linear_multiplies_activations_of_eight_bits(
    m: int, weight: QuantizedWeight, biased: bool
) -> None:
    n, k = weight.codes.shape
    x, bias = torch.randn(m, k), torch.randn(n) if biased else None
    y = CPU.linear(x, replace(CPU.pack_quantized(weight), bias=bias))
    columns = torch.arange(k) if weight.input_order is None else weight.input_order
    rounded = _to_bytes(x[:, columns], weight.group_size)
    # A quotient next to one half may be rounded the other way: one step of one feature.
    exact = rounded.double() @ dequantize(weight)[:, columns].double().T
    exact += 0 if bias is None else bias.double()
    step = x.abs().amax(dim=1, keepdim=True) / 127
    largest = dequantize(weight).abs().amax()
    assert ((y - exact).abs() <= step * largest + 1e-4 * (1 + exact.abs())).all()


@QUANTIZED_EXAMPLES
@given(m=st.integers(0, 9), weight=quantized_weights(), biased=st.booleans())
def test_torch_computes_the_product_with_the_dequantised_weight(
    m: int, weight: QuantizedWeight, biased: bool
) -> None:
    n, k = weight.codes.shape
    x, bias = torch.randn(m, k), torch.randn(n) if biased else None
    kernels: list[Kernels] = [TorchKernels(), ReferenceKernels()]
    for each in kernels:
        y = each.linear(x, replace(each.pack_quantized(weight), bias=bias))
        _assert_close(y, x, dequantize(weight), bias)


def test_eight_bit_activations_cost_less_than_a_hundredth() -> None:
    x, weight = torch.randn(64, 1024), random_weight(256, 1024, 64)
    exact = x.double() @ dequantize(weight).double().T
    y = CPU.linear(x, CPU.pack_quantized(weight))
    assert (y - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4", "int8 per row"])
def test_what_is_not_finite_stays_so_in_its_row_only(kind: str, bad: float) -> None:
    x = torch.randn(3, 96)
    x[1, 70] = bad
    finite = CPU.linear(x, _linear(kind, 40, 96)).isfinite()
    assert finite[[0, 2]].all() and not finite[1].any()


@pytest.mark.parametrize("size", [1e-36, 1e-37, 1e-40])
def test_activations_next_to_nothing_make_products_next_to_nothing(size: float) -> None:
    weight, x = random_weight(40, 128, 64, zeros=True), torch.full((3, 128), size)
    y = CPU.linear(x, CPU.pack_quantized(weight))
    # Beside the rounding of what is below float32's normal range.
    assert (y.abs() <= 1.01 * x.abs() @ dequantize(weight).abs().T + 1e-37).all()


@pytest.mark.parametrize("group", [16, 48, 96])
def test_groups_that_the_c_kernels_do_not_read_are_refused_with_a_way_out(group: int) -> None:
    with pytest.raises(ConfigError, match=f"groups of {group} inputs.*--group-size 32, 64 or 128"):
        CPU.pack_quantized(random_weight(8, 2 * group, group))


def test_weights_take_as_many_bytes_as_they_have_bits() -> None:
    assert CPU.pack_full(torch.randn(64, 100).bfloat16()).weight.nbytes == 64 * 100 * 2
    packed = CPU.pack_quantized(random_weight(64, 256, 64, zeros=True))
    assert packed.codes.nbytes == 64 * 256 // 2
    assert packed.scales.nbytes == 64 * 256 // 64 * 2
    assert packed.zeros is not None and packed.zeros.nbytes == 64 * 256 // 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_packed_table_are_found(dtype: torch.dtype) -> None:
    table, tokens = torch.randn(70, 24).to(dtype), torch.tensor([69, 0, 31, 32, 31])
    assert torch.equal(CPU.embed(tokens, CPU.pack_full(table)), table[tokens].float())


def _linear(kind: str, n: int, k: int) -> Linear:
    packed: Linear
    match kind:
        case "int4" | "int4 with zeros":
            packed = CPU.pack_quantized(random_weight(n, k, 32, 4, zeros=kind != "int4"))
        case "int8 per row":
            packed = CPU.pack_quantized(random_weight(n, k, k, 8))
        case _:
            packed = CPU.pack_full(torch.randn(n, k).to(getattr(torch, kind)))
    return replace(packed, bias=torch.randn(n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [96, 256, 1536])
def test_a_row_is_the_same_alone_and_in_any_batch(kind: str, k: int) -> None:
    linear = _linear(kind, 45, k)
    x = torch.randn(130, k)
    alone = torch.cat([CPU.linear(row[None], linear) for row in x])
    for rows in (2, 3, 4, 7, 17, 49, 130):
        assert torch.equal(CPU.linear(x[:rows], linear), alone[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind: str) -> None:
    x, linear = torch.randn(70, 1056), _linear(kind, 333, 1056)
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
    _assert_close(fallback.linear(x, fallback.pack_full(full)), x, full, None)
