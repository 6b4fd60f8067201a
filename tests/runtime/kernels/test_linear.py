"""The CPU linear against float64, and its rows' independence of the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morphserve.runtime.kernels import FullLinear, Int4Linear
from morphserve.runtime.kernels.cpu import CpuKernels, TorchKernels
from morphserve.runtime.kernels.reference import ReferenceKernels, dequantise

EXAMPLES = settings(max_examples=25, derandomize=True, deadline=None)
DTYPES = [torch.float32, torch.bfloat16]
CPU = CpuKernels()


def _tolerance(x: Tensor, weight: Tensor) -> Tensor:
    """Rounding bound of a float32 sum in W >= 4 lanes: about K / 4 roundings of the magnitudes."""
    return (x.abs().double() @ weight.abs().double().T) * (x.shape[1] / 4 + 16) * 2.0**-24


def _assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert ((y.double() - exact).abs() <= _tolerance(x, weight) + 1e-6 * exact.abs()).all()


def _random_int4(n: int, k: int, group: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    return codes, (torch.randn(n, k // group) * 0.02).half()


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


@EXAMPLES
@given(
    m=st.integers(0, 120),
    n=st.integers(1, 70),
    groups=st.integers(1, 20),
    group=st.sampled_from([32, 64, 128]),
    biased=st.booleans(),
)
def test_int4_linear_equals_the_full_one_bit_for_bit(
    m: int, n: int, groups: int, group: int, biased: bool
) -> None:
    x, (codes, scales) = torch.randn(m, groups * group), _random_int4(n, groups * group, group)
    bias = torch.randn(n) if biased else None
    reference = ReferenceKernels()
    weight = dequantise(Int4Linear(*reference.pack_int4(codes, scales), None, group))
    y = CPU.linear(x, Int4Linear(*CPU.pack_int4(codes, scales), bias, group))
    assert torch.equal(y, CPU.linear(x, FullLinear(weight, bias)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_full_precision_keeps_the_tensor(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 64).to(dtype)
    assert CPU.pack_full(weight).data_ptr() == weight.data_ptr()


def test_int4_takes_half_a_byte_and_a_float32_per_group() -> None:
    codes, scales = CPU.pack_int4(*_random_int4(10, 256, 64))
    assert codes.nbytes == 10 * 256 // 2
    assert scales.nbytes == 10 * 256 // 64 * 4


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("k", [96, 256, 1536])
def test_a_row_is_the_same_alone_and_in_any_batch(kind: str, k: int) -> None:
    n = 45
    if kind == "int4":
        linear: FullLinear | Int4Linear
        linear = Int4Linear(*CPU.pack_int4(*_random_int4(n, k, 32)), torch.randn(n), 32)
    else:
        linear = FullLinear(torch.randn(n, k).to(getattr(torch, kind)), torch.randn(n))
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
    fallback = TorchKernels()
    x, (codes, scales), bias = torch.randn(5, 128), _random_int4(600, 128, 64), torch.randn(600)
    packed = Int4Linear(*fallback.pack_int4(codes, scales), bias, 64)
    _assert_close(fallback.linear(x, packed), x, dequantise(packed), bias)
    weight = torch.randn(30, 128)
    _assert_close(fallback.linear(x, FullLinear(weight, None)), x, weight, None)
