"""GPTQ against brute force and against rounding to nearest."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from morphserve.quantize import dense
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.dense import LINEARS
from morphserve.quantize.gptq import aim, quantize_gptq, quantize_layer_gptq
from morphserve.quantize.moments import Calibration
from morphserve.quantize.rounding import Grid, dequantize, quantize_rtn
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

GRIDS = [Grid(4, 16), Grid(4, 32, symmetric=False), Grid(8, 0)]


def problem(seed: int, outputs: int = 8, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """A weight and the moments of correlated inputs of unlike sizes."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=random) * torch.rand(inputs, generator=random)
    x = torch.randn(4 * inputs, inputs, generator=random) @ mixing
    return torch.randn(outputs, inputs, generator=random), x.t() @ x / len(x)


def output_error(rounded: QuantizedWeight, weight: Tensor, moments: Tensor) -> float:
    error = dequantize(rounded) - weight
    return float((error @ moments * error).sum())


def solve_by_hand(
    weight: Tensor, moments: Tensor, grid: Grid, order: list[int], scales: QuantizedWeight
) -> Tensor:
    """Codes, column by column in float64: what is left is fitted anew after each, by the inverse
    moments of the columns that are left."""
    weight, codes = weight.double(), torch.zeros_like(weight, dtype=torch.uint8)
    damped = moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(len(moments))
    zeros = (
        scales.zeros if scales.zeros is not None else torch.full_like(scales.scales, grid.middle)
    )
    for step, j in enumerate(order):
        group = j // scales.group_size
        scale, zero = scales.scales[:, group].double(), zeros[:, group].double()
        code = ((weight[:, j] / scale).round() + zero).clamp(0, grid.max_code)
        codes[:, j] = code.to(torch.uint8)
        error = weight[:, j] - (code - zero) * scale
        left = order[step:]
        inverse = torch.linalg.inv(damped[left][:, left])
        weight[:, left] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return codes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_codes_are_those_of_the_textbook(grid: Grid, act_order: bool, seed: int) -> None:
    weight, moments = problem(seed, inputs=160)  # more columns than are updated at once
    order = list(range(160))
    if act_order:
        order.sort(key=lambda j: -float(moments[j, j]))
    nearest = quantize_rtn(weight, grid, moments.diagonal())  # has the same scales
    solved = quantize_gptq(weight, moments, grid, act_order)
    assert torch.equal(solved.scales, nearest.scales)
    by_hand = solve_by_hand(weight, moments, grid, order, nearest)
    assert float((solved.codes != by_hand).float().mean()) < 0.002  # ties under other roundings
    assert float((solved.codes != nearest.codes).float().mean()) > 0.2


@given(st.integers(0, 2**32), st.sampled_from(GRIDS), st.booleans())
def test_outputs_change_less_than_by_rounding_to_nearest(
    seed: int, grid: Grid, act_order: bool
) -> None:
    weight, moments = problem(seed)
    solved = output_error(quantize_gptq(weight, moments, grid, act_order), weight, moments)
    nearest = output_error(quantize_rtn(weight, grid, moments.diagonal()), weight, moments)
    assert solved < nearest


@pytest.mark.parametrize("grid", GRIDS)
def test_inputs_without_correlation_are_rounded_to_nearest(grid: Grid) -> None:
    weight, _ = problem(0)
    moments = torch.diag(torch.rand(64) + 0.1)
    solved, nearest = (
        quantize_gptq(weight, moments, grid),
        quantize_rtn(weight, grid, moments.diag()),
    )
    assert torch.equal(solved.codes, nearest.codes)
    assert torch.equal(solved.scales, nearest.scales)


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    weight, moments = problem(0)
    moments[5] = moments[:, 5] = 0
    grid = Grid(4, 16)
    solved, nearest = (
        quantize_gptq(weight, moments, grid),
        quantize_rtn(weight, grid, moments.diag()),
    )
    assert torch.equal(solved.codes[:, 5], nearest.codes[:, 5])
    assert output_error(solved, weight, moments) < output_error(nearest, weight, moments)
    silent = quantize_gptq(weight, torch.zeros(64, 64), grid)
    assert output_error(silent, weight, torch.eye(64)) < 0.02 * float(weight.square().sum())


def test_inputs_of_one_direction_can_be_solved() -> None:
    weight, _ = problem(0)
    x = torch.linspace(-1, 1, 64) * 1e-8
    solved = quantize_gptq(weight, torch.outer(x, x), Grid(4, 16))
    assert float(((dequantize(solved) - weight) @ x).abs().max()) < 0.02 * float(x.norm())


def test_scales_that_are_zero_make_weights_zero() -> None:
    _, moments = problem(0)
    weight = torch.full((2, 64), 1e-9)
    weight[1] = 0
    assert bool((dequantize(quantize_gptq(weight, moments, Grid(4, 16))) == 0).all())


def test_a_target_is_the_damped_least_squares_fit() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 48, generator=random) @ torch.randn(48, 48, generator=random)
    y = x + torch.randn(200, 48, generator=random)
    weight = torch.randn(6, 48, generator=random)
    moments, drift = y.t() @ y / 200, (x - y).t() @ y / 200
    damping = (0.03 * float(moments.diagonal().mean())) ** 0.5
    rows = torch.cat((y / 200**0.5, damping * torch.eye(48))).double()
    wanted = torch.cat((x @ weight.t() / 200**0.5, damping * weight.t())).double()
    fitted = torch.linalg.lstsq(rows, wanted).solution.t()
    aimed = aim(weight, weight @ drift, moments, 0.03)
    torch.testing.assert_close(aimed.double(), fitted, atol=1e-3, rtol=1e-3)
    assert float((fitted - weight).abs().max()) > 0.05


@torch.inference_mode()
def test_linears_make_up_for_the_ones_before_them(tiny_model: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    tokens = torch.randint(0, 256, (40, 100), generator=torch.Generator().manual_seed(1))
    calibration = Calibration(checkpoint.static(), checkpoint.architecture, tokens)
    full = dense.to_float32(checkpoint.layer(0))
    calibration.enter(full)
    grid, moments = Grid(4, 32), calibration.moments()
    alone = {
        linear: quantize_gptq(getattr(full, linear), moments[linear], grid) for linear in LINEARS
    }
    apart = LayerTensors(norms=full.norms, biases=full.biases, **alone)
    together = quantize_layer_gptq(full, calibration.inputs(), grid)
    assert torch.equal(together.qkv.codes, apart.qkv.codes)
    error, error_apart = (
        calibration.output_error(dense.quantized_to_float32(layer)) for layer in (together, apart)
    )
    assert error < 0.95 * error_apart
