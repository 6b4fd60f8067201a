"""Norms and SiLU on the CPU against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphserve.runtime.kernels.cpu import CpuKernels
from morphserve.runtime.kernels.reference import ReferenceKernels

EXAMPLES = settings(max_examples=25)
CPU, REFERENCE = CpuKernels(), ReferenceKernels()


@EXAMPLES
@given(rows=st.integers(1, 20), width=st.integers(1, 400))
def test_norms_match_the_reference(rows: int, width: int) -> None:
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.rand(width)
    torch.testing.assert_close(
        CPU.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6
    )
    total = residual.clone()
    normed = CPU.add_rms_norm(x, total, weight, 1e-5)
    assert torch.equal(total, residual + x)
    torch.testing.assert_close(
        normed, REFERENCE.rms_norm(total, weight, 1e-5), rtol=1e-5, atol=1e-6
    )


@EXAMPLES
@given(rows=st.integers(1, 20), width=st.integers(1, 100), spread=st.sampled_from([1.0, 300.0]))
def test_silu_matches_the_reference_even_where_exp_would_overflow(
    rows: int, width: int, spread: float
) -> None:
    gate_up = torch.randn(rows, 2 * width) * spread
    torch.testing.assert_close(CPU.silu_mul(gate_up), REFERENCE.silu_mul(gate_up))


@pytest.mark.parametrize("width", [90, 1024])
def test_rows_are_the_same_alone_and_in_a_batch(width: int) -> None:
    x, weight = torch.randn(40, width), torch.rand(width)
    normed, gated = CPU.rms_norm(x, weight, 1e-6), CPU.silu_mul(x)
    for i in range(len(x)):
        assert torch.equal(CPU.rms_norm(x[i : i + 1], weight, 1e-6)[0], normed[i])
        assert torch.equal(CPU.silu_mul(x[i : i + 1])[0], gated[i])


def test_what_is_not_a_number_stays_so() -> None:
    gate_up = torch.ones(1, 40)
    gate_up[0, 7] = float("nan")
    assert CPU.silu_mul(gate_up).isnan().nonzero().tolist() == [[0, 7]]
    assert CPU.rms_norm(gate_up, torch.ones(40), 1e-6).isnan().all()
