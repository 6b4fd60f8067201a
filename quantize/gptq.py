"""GPTQ: columns are rounded one by one, each error made up for by the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1, with scales fixed beforehand and, within a layer, targets corrected
for what the linears rounded before have done to the input.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from morphserve.quantize.dense import LINEARS
from morphserve.quantize.moments import LayerInputs, Seen
from morphserve.quantize.rounding import (
    Grid,
    Scales,
    dequantize,
    divisors,
    find_scales,
    grouped,
    join,
    quantized,
)
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

_BLOCK = 128  # columns between two updates of all later ones
_ROWS = 2048  # rows in work at a time: bounds memory, and a block of them stays in the cache
# Shares of the mean diagonal that are added to it; the first that makes moments invertible.
_DAMPING = (0.01, 0.1, 1.0)
_AIM_DAMPING = (0.03, 0.3)  # more, so that targets don't follow the noise of few tokens


def quantize_layer_gptq(
    full: LayerTensors[Tensor], inputs: LayerInputs, grid: Grid, act_order: bool = True
) -> LayerTensors[QuantizedWeight]:
    """A float32 layer with its linears rounded in the order in which data meets them."""
    done = {}
    for linear in LINEARS:
        seen = inputs.of(linear)
        target = aim(getattr(full, linear), seen)
        done[linear] = quantize_gptq(target, seen.moments, grid, act_order)
        inputs.replace(linear, dequantize(done[linear]))
    return LayerTensors(norms=full.norms, biases=full.biases, **done)


def aim(weight: Tensor, seen: Seen) -> Tensor:
    """The [N, K] weight that on inputs y comes closest to `weight` on inputs x, in float32.

    Least squares, drawn towards `weight` by the damping d: W + W (E[x y^T] - E[y y^T]) M^-1
    with M = E[y y^T] + d I. But for what does not depend on Q, |W x - Q y|^2 is |W' y - Q y|^2, so
    rounding W' is rounding W for what y is.
    """
    if seen.cross is None:
        return weight
    difference = seen.cross - seen.moments
    shift = torch.cholesky_solve(difference.t(), _factor(seen.moments, _AIM_DAMPING)).t()
    return torch.addmm(weight, weight, shift)


def quantize_gptq(
    weight: Tensor, moments: Tensor, grid: Grid, act_order: bool = True
) -> QuantizedWeight:
    """A [N, K] weight rounded so that outputs change little on inputs with these moments, [K, K].

    Scales are chosen beforehand, group by group. With `act_order`, columns are rounded in order of
    their inputs' size, largest first; groups are neighbours all the same.
    """
    importance = moments.diagonal()
    order = torch.arange(len(moments), device=moments.device)
    if act_order:
        order = torch.argsort(importance, descending=True, stable=True)
    updates = _updates(moments, order)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    parts = []
    for start in range(0, len(weight), _ROWS):
        rows = weight[start : start + _ROWS].float()
        scales = find_scales(grouped(rows, grid), grid, importance)
        columns = rows[:, order].t().contiguous()
        rounded = _round_columns(columns, updates, order, scales, grid)
        codes[start : start + _ROWS, order] = rounded.t()
        parts.append(scales)
    return quantized(codes, join(parts), grid)


def _factor(moments: Tensor, damping: Sequence[float]) -> Tensor:
    """The lower Cholesky factor of damped moments.

    Damping also makes inputs harmless that are always 0: their errors go nowhere.
    """
    size = float(moments.diagonal().mean()) or 1.0
    for share in damping:
        damped = moments.clone()
        damped.diagonal().add_(share * size)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
    raise AssertionError("moments of finite inputs are positive semidefinite")


def _updates(moments: Tensor, order: Tensor) -> Tensor:
    """Unit upper triangular [K, K]: row i is what column i's error takes from later columns.

    It is U, where moments^-1 = U^T U, each row over its diagonal. With moments = R R^T and R upper
    triangular, U = R^-1; and R is the Cholesky factor of the moments in reverse order, reversed.
    """
    backwards = order.flip(0)
    factor = _factor(moments[backwards][:, backwards], _DAMPING).flip(0, 1)
    factor.div_(factor.diagonal().clone())  # of R^-1, each row is over its diagonal then
    identity = torch.eye(len(factor), device=factor.device)
    updates: Tensor = torch.linalg.solve_triangular(
        factor, identity, upper=True, unitriangular=True
    )
    return updates


def _round_columns(
    weight: Tensor, updates: Tensor, order: Tensor, scales: Scales, grid: Grid
) -> Tensor:
    """Codes of a float32 [K, N] weight, its columns as rows in this order; it is used up."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale, zero = scales.scale.float().t().contiguous(), scales.zero.float().t().contiguous()
    divisor = divisors(scale)
    group = (order // (len(order) // len(scale))).tolist()
    with _one_thread():
        for start in range(0, len(weight), _BLOCK):
            end = min(start + _BLOCK, len(weight))
            errors = torch.empty_like(weight[start:end])
            for i in range(start, end):
                column, g = weight[i], group[i]
                code = ((column / divisor[g]).round_() + zero[g]).clamp_(0, grid.max_code)
                codes[i] = code
                error = torch.addcmul(column, code - zero[g], scale[g], value=-1)
                weight[i + 1 : end].addr_(updates[i, i + 1 : end], error, alpha=-1)
                errors[i - start] = error
            weight[end:].addmm_(updates[start:end, end:].t(), errors, alpha=-1)
    return codes


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of a column are so small that waiting for other threads takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
