"""AWQ: inputs that carry much are scaled up before rounding, what feeds them is scaled down.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration". Only
the folds that leave K and V as they are: from a norm into its own linears, and from up into down.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from morphserve.quantize.dense import Linear
from morphserve.quantize.rounding import Grid, dequantize, quantize_rtn
from morphserve.quantize.weights import LayerTensors, Norms, QuantizedWeight

_ALPHAS = tuple(step / 20 for step in range(20))
_SAMPLE_ROWS = 512  # of a weight, that an exponent is judged by


@dataclass(frozen=True, slots=True)
class Folds:
    """What the inputs of linears are divided by, and their weights multiplied."""

    qkv: Tensor  # [hidden], out of the input norm
    gate_up: Tensor  # [hidden], out of the post-attention norm
    down: Tensor  # [intermediate], out of the rows of up


def quantize_layer_awq(
    full: LayerTensors[Tensor], moments: Mapping[Linear, Tensor], grid: Grid, stored: Norms
) -> LayerTensors[QuantizedWeight]:
    """A float32 layer scaled and rounded; its norms are its own, of the dtypes of the `stored`."""
    folded, folds = fold(full, find_folds(full, moments, grid), stored)
    importance = {linear: matrix.diagonal() for linear, matrix in moments.items()}
    return LayerTensors(
        norms=folded.norms,
        biases=folded.biases,
        qkv=quantize_rtn(folded.qkv, grid, importance["qkv"] / folds.qkv.square()),
        o=quantize_rtn(folded.o, grid, importance["o"]),
        gate_up=quantize_rtn(folded.gate_up, grid, importance["gate_up"] / folds.gate_up.square()),
        down=quantize_rtn(folded.down, grid, importance["down"] / folds.down.square()),
    )


def find_folds(full: LayerTensors[Tensor], moments: Mapping[Linear, Tensor], grid: Grid) -> Folds:
    """Of each linear the scales s = size^alpha of its inputs, alpha from 0 to 0.95, under which
    rounding changes its outputs least."""
    return Folds(
        qkv=_find_scale(full.qkv, moments["qkv"], grid),
        gate_up=_find_scale(full.gate_up, moments["gate_up"], grid),
        down=_find_scale(full.down, moments["down"], grid),
    )


def _find_scale(weight: Tensor, moments: Tensor, grid: Grid) -> Tensor:
    """[K], by the error tr(D M D^T) of some rows, D their rounding error, M the moments."""
    rows = weight[:: -(-len(weight) // _SAMPLE_ROWS)]
    energy = moments.diagonal()
    size = energy.clamp(min=1e-6 * float(energy.mean()) or 1.0).sqrt()
    best, best_error = torch.ones_like(size), float("inf")
    for alpha in _ALPHAS:
        scale = size**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = quantize_rtn(rows * scale, grid, energy / scale.square())
        error = dequantize(rounded) / scale - rows
        output_error = float((error @ moments * error).sum(dtype=torch.double))
        if output_error < best_error:
            best, best_error = scale, output_error
    return best


def fold(
    full: LayerTensors[Tensor], folds: Folds, stored: Norms
) -> tuple[LayerTensors[Tensor], Folds]:
    """The layer that computes the same with norms of the dtypes of the `stored`, and its folds.

    Norms are rounded first and weights multiplied by what is left, so that nothing is lost.
    """
    input_norm, qkv = _fold_norm(full.norms.input, folds.qkv, stored.input.dtype)
    post_attention, gate_up = _fold_norm(
        full.norms.post_attention, folds.gate_up, stored.post_attention.dtype
    )
    gate, up = (full.gate_up * gate_up).chunk(2)
    bias = full.biases.gate_up
    if bias is not None:
        gate_bias, up_bias = bias.chunk(2)
        bias = torch.cat((gate_bias, up_bias / folds.down))
    layer = LayerTensors(
        norms=replace(full.norms, input=input_norm, post_attention=post_attention),
        biases=replace(full.biases, gate_up=bias),
        qkv=full.qkv * qkv,
        o=full.o,
        gate_up=torch.cat((gate, up / folds.down.unsqueeze(1))),
        down=full.down * folds.down,
    )
    return layer, Folds(qkv, gate_up, folds.down)


def _fold_norm(norm: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm over `scale` in `dtype`, and by what exactly it was divided."""
    folded = (norm / scale).to(dtype)
    possible = (folded != 0) & folded.isfinite()
    exact = torch.where(possible, norm / folded.float(), 1.0)
    return torch.where(possible, folded, norm.to(dtype)), exact


def unfold(layer: LayerTensors[Tensor], full: LayerTensors[Tensor]) -> LayerTensors[Tensor]:
    """A float32 layer with its weights as they would be without folds, to compare with `full`.

    Norms tell what was folded out of them; of rows of up, the least squares do.
    """
    gate_up = layer.gate_up * _ratio(layer.norms.post_attention, full.norms.post_attention)
    gate, up = gate_up.chunk(2)
    exact = full.gate_up.chunk(2)[1]
    scale = _ratio((up * exact).sum(dim=1), exact.square().sum(dim=1))
    return replace(
        layer,
        norms=full.norms,
        qkv=layer.qkv * _ratio(layer.norms.input, full.norms.input),
        gate_up=torch.cat((gate, up / scale.unsqueeze(1))),
        down=layer.down * scale,
    )


def _ratio(ours: Tensor, exact: Tensor) -> Tensor:
    """1 where one of them is 0."""
    return torch.where((ours == 0) | (exact == 0), 1.0, ours / exact)
