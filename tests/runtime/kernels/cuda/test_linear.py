"""The CUDA linears against the reference, which computes in float64 here."""

import dataclasses

import emulated_codes  # noqa: F401
import pytest
import torch
from kernel_batches import random_weight
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.rounding import dequantize
from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import QuantizedLinear
from morphserve.runtime.kernels.cuda import linear as linears
from morphserve.runtime.kernels.cuda.linear import MOST_ROWS_OF_CODES, linear
from morphserve.runtime.kernels.cuda.packing import pack_full, pack_quantized
from morphserve.runtime.kernels.cuda.scratch import Scratch, scratch_of
from morphserve.runtime.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
BF16 = torch.bfloat16
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _pack(weight: QuantizedWeight, device: str, bias: Tensor | None = None) -> QuantizedLinear:
    packed = dataclasses.replace(pack_quantized(weight), bias=bias)
    tensors = {
        field.name: value.to(device)
        for field in dataclasses.fields(packed)
        if isinstance(value := getattr(packed, field.name), Tensor)
    }
    return dataclasses.replace(packed, **tensors)


def _assert_close(y: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> None:
    """Sums are float32, results are rounded once; so are weights that cuBLAS multiplies.

    Tensor cores cut off what they add where they do not round: four times the error of rounding.
    """
    added = torch.zeros(len(weight.codes)) if bias is None else bias.cpu()
    reference = dataclasses.replace(REFERENCE.pack_quantized(weight), bias=added)
    exact = REFERENCE.linear(x.cpu().double(), reference)
    largest = x.cpu().double().abs() @ dequantize(weight).double().abs().T + added.abs()
    rounding = torch.finfo(y.dtype).eps / 2
    bound = largest * (x.shape[1] + 16) * 2.0**-22 + exact.abs() * 1.01 * rounding
    if y.dtype == BF16 and len(x) > MOST_ROWS_OF_CODES:
        bound += largest * rounding
    assert ((y.cpu().double() - exact).abs() <= bound).all()


# rows, outputs, inputs, group, zeros, ordered, biased
QUANTIZED = [
    (1, 64, 64, 64, False, False, False),
    (2, 100, 96, 32, True, False, True),
    (5, 200, 192, 96, False, True, False),
    (16, 130, 1536, 128, False, False, False),
    (17, 64, 576, 576, False, False, True),
    (33, 70, 256, 64, True, True, True),
    (64, 128, 1024, 128, True, False, False),
    (100, 257, 384, 128, False, False, True),
    (150, 72, 128, 32, False, False, False),
    (300, 130, 192, 32, True, True, True),
    (3, 40, 70, 70, False, False, False),
]


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k", "group", "zeros", "ordered", "biased"), QUANTIZED)
def test_quantised_linear_is_the_references(
    m: int,
    n: int,
    k: int,
    group: int,
    zeros: bool,
    ordered: bool,
    biased: bool,
    bits: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    weight = random_weight(n, k, group, bits, zeros, ordered)
    x = torch.randn(m, k, device=device).to(dtype)
    bias = torch.randn(n, device=device).to(dtype) if biased else None
    _assert_close(linear(x, _pack(weight, device, bias)), x, weight, bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_large_activations_hide_no_small_ones(bits: int, device: str) -> None:
    weight = random_weight(64, 256, 64, bits)
    x = torch.randn(4, 256, device=device)
    x[:, 37] *= 1e6
    x[1] *= 1e30
    x[2] *= 1e-30
    _assert_close(linear(x.to(BF16), _pack(weight, device)), x.to(BF16), weight, None)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [3, 300])
def test_what_is_not_finite_stays_so_in_its_row_only(rows: int, bad: float, device: str) -> None:
    x = torch.randn(rows, 96, device=device).to(BF16)
    x[1, 70] = bad
    weight = _pack(random_weight(40, 96, 32), device)
    finite = linear(x, weight).isfinite().all(dim=1)
    assert not finite[1] and finite.sum() == rows - 1


@pytest.mark.parametrize("rows", [7, 300])
def test_results_go_where_they_are_asked_for(rows: int, device: str) -> None:
    weight, x = random_weight(130, 1024, 64), torch.randn(rows, 1024, device=device).to(BF16)
    packed = _pack(weight, device)
    wide = torch.zeros(rows, 150, dtype=BF16, device=device)
    out = wide[:, 10:140]
    assert linear(x, packed, out) is out
    assert torch.equal(out, linear(x, packed))
    assert not wide[:, :10].any() and not wide[:, 140:].any()


def test_rows_of_activations_may_lie_apart(device: str) -> None:
    weight, wide = random_weight(64, 64, 32), torch.randn(5, 200, device=device).to(BF16)
    packed = _pack(weight, device)
    assert torch.equal(linear(wide[:, 8:72], packed), linear(wide[:, 8:72].contiguous(), packed))


def test_no_rows_have_no_results(device: str) -> None:
    x = torch.empty(0, 64, dtype=BF16, device=device)
    assert linear(x, _pack(random_weight(40, 64, 32), device)).shape == (0, 40)


def test_programs_that_share_a_block_leave_their_counters_at_zero(device: str) -> None:
    weight, x = random_weight(64, 2048, 128), torch.randn(3, 2048, device=device).to(BF16)
    packed = _pack(weight, device)
    first = linear(x, packed)
    assert not scratch_of(x.device).arrived.any()
    linear(x * 2, packed)
    assert torch.equal(linear(x, packed), first)


@pytest.mark.parametrize("biased", [False, True])
def test_weights_larger_than_the_scratch_memory_are_dequantised_in_slices(
    biased: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = torch.empty(2 * 64 * 192 * 2, dtype=torch.uint8, device=device)
    small = Scratch(room, torch.zeros(1, dtype=torch.int32, device=device))
    monkeypatch.setattr(linears, "scratch_of", lambda device: small)
    weight, x = random_weight(330, 192, 64, zeros=True), torch.randn(270, 192, device=device)
    bias = torch.randn(330, device=device).to(BF16) if biased else None
    _assert_close(linear(x.to(BF16), _pack(weight, device, bias)), x.to(BF16), weight, bias)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("m", [1, 33])
def test_full_linear_is_torchs(m: int, biased: bool, dtype: torch.dtype, device: str) -> None:
    x, weight = (torch.randn(rows, 96, device=device).to(dtype) for rows in (m, 70))
    bias = torch.randn(70, device=device).to(dtype) if biased else None
    packed = dataclasses.replace(pack_full(weight), bias=bias)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(linear(x, packed), expected)
    torch.testing.assert_close(linear(x, packed, torch.empty_like(expected)), expected)


@pytest.mark.parametrize(("bits", "per_byte"), [(4, 2), (8, 1)])
def test_weights_take_as_many_bytes_as_they_have_bits(bits: int, per_byte: int) -> None:
    packed = pack_quantized(random_weight(128, 1024, 128, bits, zeros=True))
    assert packed.codes.nbytes == 128 * 1024 // per_byte
    assert packed.scales.nbytes == 128 * 8 * 2
    assert packed.zeros is not None and packed.zeros.nbytes == 128 * 8


def test_sizes_are_known_without_content() -> None:
    real = pack_quantized(random_weight(100, 192, 64, zeros=True, ordered=True))
    with torch.device("meta"):
        outline = pack_quantized(
            QuantizedWeight(
                codes=torch.empty(100, 192, dtype=torch.uint8),
                scales=torch.empty(100, 3, dtype=torch.float16),
                group_size=64,
                zeros=torch.empty(100, 3, dtype=torch.uint8),
                input_order=torch.empty(192, dtype=torch.int64),
            )
        )
    for name in ("codes", "scales", "zeros", "input_order"):
        assert getattr(outline, name).shape == getattr(real, name).shape
        assert getattr(outline, name).dtype == getattr(real, name).dtype


def test_groups_that_the_kernels_do_not_read_are_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="groups of 48 inputs.*--group-size 32, 64 or 128"):
        pack_quantized(random_weight(8, 96, 48))


@pytest.mark.cuda
@NEEDS_GPU
@pytest.mark.parametrize("rows", [1, 16, 40, 128, 200, 512])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336)])
def test_layers_of_an_8b_model(rows: int, n: int, k: int) -> None:
    weight, x = random_weight(n, k, 128), torch.randn(rows, k, device="cuda").to(BF16)
    _assert_close(linear(x, _pack(weight, "cuda")), x, weight, None)


@pytest.mark.cuda
@NEEDS_GPU
@pytest.mark.parametrize("rows", [1, 32, 64, 128])
def test_programs_that_share_a_block_see_all_of_each_other_s_sums(rows: int) -> None:
    weights = [_pack(random_weight(4096, 4096, 128), "cuda") for _ in range(2)]
    x = torch.randn(rows, 4096, device="cuda").to(BF16)
    first = [linear(x, weight) for weight in weights]
    for _ in range(200):  # what is left of the other product would show
        again = [linear(x, weight) for weight in weights]
        assert all(map(torch.equal, again, first))


@pytest.mark.cuda
@NEEDS_GPU
@pytest.mark.parametrize("rows", [8, 300])
def test_a_captured_graph_computes_with_new_activations(rows: int) -> None:
    packed = _pack(random_weight(512, 4096, 128), "cuda")
    x = torch.randn(rows, 4096, device="cuda").to(BF16)
    out = torch.empty(rows, 512, dtype=BF16, device="cuda")
    linear(x, packed, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear(x, packed, out)
    for _ in range(3):
        x.normal_()
        graph.replay()
        # Results are about 6 in size; cuBLAS may choose another algorithm while it is captured.
        torch.testing.assert_close(out, linear(x, packed), atol=0.1, rtol=0.01)
