"""Norms, SiLU and the embedding's rows on CUDA against the reference."""

import pytest
import torch
from guarded import guarded_outputs

from morphserve.runtime.kernels import FullLinear
from morphserve.runtime.kernels.cuda import embed, pointwise
from morphserve.runtime.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]
# Float32: sums in another order. Bfloat16: the same, rounded to neighbouring numbers at times.
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2.0**-7, 0.0)}
# Rows and widths: of one item; several rows to a program; odd; of Llama 8B; the widest.
SIZES = [(3, 1), (9, 64), (6, 90), (5, 333), (3, 896), (3, 4096), (2, 5120), (2, 16384)]

OVERFLOWS = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter's numpy


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _assert_close(mine: torch.Tensor, wanted: torch.Tensor) -> None:
    rtol, atol = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(mine, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_norms_match_the_reference(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    x, residual = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    weight = (torch.rand(width, device=device) + 0.5).to(dtype)
    with guarded_outputs():
        normed = pointwise.rms_norm(x, weight, 1e-5)
    _assert_close(normed, REFERENCE.rms_norm(x, weight, 1e-5))
    total, given = residual.clone(), x.clone()
    with guarded_outputs():
        normed = pointwise.add_rms_norm(x, total, weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert torch.equal(x, given)
    _assert_close(normed, REFERENCE.rms_norm(total, weight, 1e-5))


def test_the_norm_is_that_of_the_sum_as_it_was_rounded(device: str) -> None:
    x, residual = torch.rand(4, 64, device=device), torch.rand(4, 64, device=device).bfloat16()
    weight = torch.ones(64, device=device)
    normed = pointwise.add_rms_norm(x, residual, weight, 1e-5)  # float32, as x is
    _assert_close(normed, REFERENCE.rms_norm(residual.float(), weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 333, 1024])
def test_chosen_rows_are_added_and_normed_and_nothing_is_written(
    width: int, dtype: torch.dtype, device: str
) -> None:
    x, residual = (torch.randn(7, width, device=device).to(dtype) for _ in range(2))
    weight = (torch.rand(width, device=device) + 0.5).to(dtype)
    kept = residual.clone()
    for rows in ([0, 3, 4, 6], [5], [2, 2]):
        chosen = torch.tensor(rows, device=device)
        with guarded_outputs():
            normed = pointwise.add_rms_norm_rows(x, residual, chosen, weight, 1e-5)
        _assert_close(normed, REFERENCE.rms_norm((residual + x)[chosen], weight, 1e-5))
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 90, 1024, 1500])
@pytest.mark.parametrize("spread", [1.0, 300.0])
@OVERFLOWS
def test_silu_matches_the_reference_even_where_exp_overflows(
    width: int, spread: float, dtype: torch.dtype, device: str
) -> None:
    gate_up = (torch.randn(3, 2 * width, device=device) * spread).to(dtype)
    with guarded_outputs():
        gated = pointwise.silu_mul(gate_up)
    rtol, _ = TOLERANCE[dtype]
    torch.testing.assert_close(gated, REFERENCE.silu_mul(gate_up), rtol=rtol, atol=1e-6)


def test_rows_are_the_same_alone_and_in_a_batch(device: str) -> None:
    x, weight = torch.randn(9, 96, device=device), torch.rand(96, device=device)
    normed, gated = pointwise.rms_norm(x, weight, 1e-6), pointwise.silu_mul(x)
    for i in range(len(x)):
        assert torch.equal(pointwise.rms_norm(x[i : i + 1], weight, 1e-6)[0], normed[i])
        assert torch.equal(pointwise.silu_mul(x[i : i + 1])[0], gated[i])


def test_what_is_not_a_number_stays_so(device: str) -> None:
    gate_up = torch.ones(1, 40, device=device)
    gate_up[0, 7] = torch.nan
    assert pointwise.silu_mul(gate_up).isnan().nonzero().tolist() == [[0, 7]]
    assert pointwise.rms_norm(gate_up, torch.ones(40, device=device), 1e-6).isnan().all()


def test_of_no_rows_comes_nothing(device: str) -> None:
    none, weight = torch.empty(0, 64, device=device), torch.ones(64, device=device)
    assert pointwise.rms_norm(none, weight, 1e-5).shape == (0, 64)
    assert pointwise.silu_mul(none).shape == (0, 32)
    table = FullLinear(torch.ones(3, 64, device=device), None, 3)
    assert embed.embed(torch.empty(0, dtype=torch.int64, device=device), table).shape == (0, 64)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 333, 1500])
def test_embedding_gives_rows_of_the_table(
    width: int, dtype: torch.dtype, ids: torch.dtype, device: str
) -> None:
    table = FullLinear(torch.randn(11, width, device=device).to(dtype), None, 11)
    tokens = torch.tensor([4, 0, 10, 4, -1], dtype=ids, device=device)
    wanted = table.weight[[4, 0, 10, 4, 0]]  # no token was drawn: as good as any
    with guarded_outputs():
        assert torch.equal(embed.embed(tokens, table), wanted)
        rows, zeros = embed.embed_beside_zeros(tokens, table)
        assert torch.equal(rows, wanted)
        assert torch.equal(zeros, torch.zeros_like(wanted))
