"""GPTQ: columns are rounded one by one, each error made up for by the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1, with scales fixed beforehand and, within a layer, targets corrected
for what the linears rounded before have done to the input.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from morphserve.quantize.dense import LINEARS, Linear
from morphserve.quantize.moments import LayerInputs
from morphserve.quantize.rounding import (
    Grid,
    Scales,
    choose_scales,
    dequantize,
    divisors,
    join,
    quantized,
)
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

_BLOCK = 128  # columns between two updates of all later ones
_ROWS = 2048  # rows in work at a time: bounds memory, and a block of them stays in the cache
# Shares of the mean diagonal that are added to it; the first that makes moments invertible.
_DAMPING = (0.01, 0.1, 1.0)
# Times inputs over tokens, the damping of targets: the fewer tokens, the less they are followed.
# On the demo model, with 4,096 tokens as with 16,384, 1 to 4 are alike (KL within 2 %), 13 to 16 %
# below targets that follow nothing.
_AIM_DAMPING = 2.0


def quantize_layer_gptq(
    full: LayerTensors[Tensor], inputs: LayerInputs, grid: Grid, act_order: bool = True
) -> LayerTensors[QuantizedWeight]:
    """A float32 layer with its linears rounded in the order in which data meets them."""
    done = {}
    for linear in LINEARS:
        done[linear] = _round_next(linear, getattr(full, linear), inputs, grid, act_order)
        inputs.replace(linear, dequantize(done[linear]))
    return LayerTensors(norms=full.norms, biases=full.biases, **done)


def _round_next(
    linear: Linear, weight: Tensor, inputs: LayerInputs, grid: Grid, act_order: bool
) -> QuantizedWeight:
    seen = inputs.of(linear)
    moments = seen.moments
    damping = _AIM_DAMPING * len(moments) / seen.num_tokens
    lack = None if seen.drift is None else weight @ seen.drift
    del seen  # the drift is as large as the moments
    target = weight if lack is None else aim(weight, lack, moments, damping)
    return quantize_gptq(target, moments, grid, act_order)


def aim(weight: Tensor, lack: Tensor, moments: Tensor, damping: float) -> Tensor:
    """The [N, K] weight that on inputs y comes closest to `weight` on inputs x, in float32.

    Least squares, drawn towards `weight` W: W + E[W (x - y) y^T] M^-1, where `lack` is that mean
    and M = E[y y^T] + d I, d the share `damping` of the mean diagonal. But for what does not depend
    on Q, |W x - Q y|^2 is |W' y - Q y|^2: rounding the result W' is rounding W for what y is.
    """
    factor = _factor(moments, (damping, *_DAMPING[1:]))
    return weight + torch.cholesky_solve(lack.t(), factor).t()


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
    shares = _shares(moments, order)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    parts = []
    for start in range(0, len(weight), _ROWS):
        rows = weight[start : start + _ROWS].float()
        scales = choose_scales(rows, grid, importance)
        columns = rows[:, order].t().contiguous()
        rounded = _round_columns(columns, shares, order, scales, grid)
        codes[start : start + _ROWS, order] = rounded.t()
        parts.append(scales)
    return quantized(codes, join(parts), grid)


def _factor(moments: Tensor, damping: Sequence[float]) -> Tensor:
    """The lower Cholesky factor of damped moments.

    Damping also makes inputs harmless that are always 0: their errors go nowhere.
    """
    exact = moments.diagonal().clone()
    size = float(exact.mean()) or 1.0
    for share in damping:
        moments.diagonal().copy_(exact + share * size)  # in place: a copy would be large
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(moments)
        moments.diagonal().copy_(exact)
        if not failed:
            return factor
    raise AssertionError("moments of finite inputs are positive semidefinite")


def _shares(moments: Tensor, order: Tensor) -> Tensor:
    """Unit upper triangular [K, K]: row i says how columns after i, in this order, take up that i
    is off its weight.

    If R R^T = moments with R upper triangular, it is R, each column over its diagonal: the paper
    has its inverse, to be applied to the errors against weights already changed. And R is the
    Cholesky factor of the moments in reverse order, reversed.
    """
    backwards = order.flip(0)
    factor = _factor(moments[backwards.unsqueeze(1), backwards], _DAMPING).flip(0, 1)
    return factor.div_(factor.diagonal().clone())


def _round_columns(
    weight: Tensor, shares: Tensor, order: Tensor, scales: Scales, grid: Grid
) -> Tensor:
    """Codes of a float32 [K, N] weight, its columns as rows in this order."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale, zero = scales.scale.float().t().contiguous(), scales.zero.float().t().contiguous()
    divisor = divisors(scale)
    group = (order // (len(order) // len(scale))).tolist()
    wanted = weight.clone()  # to be rounded: the weight, and what it takes up of earlier columns
    for start in range(0, len(weight), _BLOCK):
        end = min(start + _BLOCK, len(weight))
        off = torch.empty_like(weight[start:end])
        with _one_thread():
            for i in range(start, end):
                g = group[i]
                code = ((wanted[i] / divisor[g]).round_() + zero[g]).clamp_(0, grid.max_code)
                codes[i] = code
                off[i - start] = torch.addcmul(weight[i], code - zero[g], scale[g], value=-1)
                wanted[i + 1 : end].addr_(shares[i, i + 1 : end], off[i - start])
        wanted[end:].addmm_(shares[start:end, end:].t(), off)
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
