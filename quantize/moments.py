"""Second moments of what enters a layer's linears, over calibration text.

Layers run on what a full-precision model gives them: in service any of them is swapped alone.
Within a layer, linears may be replaced one by one; then the later ones meet the inputs that the
replaced ones give them, beside those of full precision.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from morphserve.quantize import dense
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.checkpoint import BadCheckpoint
from morphserve.quantize.dense import LINEARS, Linear
from morphserve.quantize.weights import LayerTensors, StaticTensors

BATCH_TOKENS = 1024  # windows that run together: bounds the memory of activations
_BLOCK = 512  # inputs whose moments are computed at once


@dataclass(frozen=True, slots=True)
class Seen:
    """Means over tokens of a linear's inputs: x at full precision, y behind replaced linears."""

    moments: Tensor  # y y^T, float32 [K, K]
    drift: Tensor | None  # (x - y) y^T, [K, K]; None where y is x
    num_tokens: int


class LayerInputs:
    """What enters the linears of one layer, to be asked for in their order."""

    def __init__(
        self,
        states: list[Tensor],
        layer: LayerTensors[Tensor],
        arch: Architecture,
        cos_sin: Tensor,
    ) -> None:
        """`states`: what enters the layer, batches of [n, length, hidden]"""
        self._states = states
        self._arch = arch
        self._cos_sin = cos_sin
        self._full = layer
        self._ours = layer
        # Of each batch how far it has come, at full precision and with what is replaced.
        self._exact = list(states)
        self._own = list(states)

    def of(self, linear: Linear) -> Seen:
        moments = drift = None
        num_tokens = 0
        for batch in range(len(self._states)):
            x, y = self._inputs(linear, batch)
            if moments is None:
                moments = y.new_zeros(y.shape[1], y.shape[1])
                drift = None if y is x else torch.zeros_like(moments)
            _add_lower(moments, y)
            if drift is not None:
                drift.addmm_((x - y).t(), y)
            num_tokens += len(y)
        if linear == LINEARS[-1]:
            self._exact, self._own, self._ours = [], [], self._full  # no longer needed
        assert moments is not None
        return Seen(
            _mirror(moments).div_(num_tokens),
            None if drift is None else drift.div_(num_tokens),
            num_tokens,
        )

    def replace(self, linear: Linear, weight: Tensor) -> None:
        """From now on `linear`, which was asked for last, has this float32 weight, [N, K]."""
        if linear == LINEARS[-1]:
            return
        changed: dict[str, Any] = {linear: weight}
        self._ours = replace(self._ours, **changed)

    def _inputs(self, linear: Linear, batch: int) -> tuple[Tensor, Tensor]:
        """[tokens, K] at full precision and now; the same object if nothing is replaced."""
        self._exact[batch], x = self._step(linear, self._exact[batch], self._full, batch)
        if self._ours is self._full:
            self._own[batch] = self._exact[batch]
            return (x := x.flatten(0, 1)), x
        self._own[batch], y = self._step(linear, self._own[batch], self._ours, batch)
        return x.flatten(0, 1), y.flatten(0, 1)

    def _step(
        self, linear: Linear, before: Tensor, layer: LayerTensors[Tensor], batch: int
    ) -> tuple[Tensor, Tensor]:
        """How far a batch has come with this linear, and what enters the linear."""
        arch = self._arch
        if linear == "qkv":
            return before, dense.qkv_input(before, layer, arch)
        if linear == "o":
            attended = dense.attend(*dense.project(before, layer, arch, self._cos_sin))
            return attended, attended
        if linear == "gate_up":
            x = dense.behind_attention(self._states[batch], before, layer)
            return x, dense.gate_up_input(x, layer, arch)
        return before, dense.down_input(dense.gate_up_input(before, layer, arch), layer)


class Calibration:
    """The hidden states of calibration text at full precision, one layer after the other."""

    def __init__(
        self, static: StaticTensors, arch: Architecture, tokens: Tensor, device: str = "cpu"
    ) -> None:
        """`tokens`: windows, [n, length]"""
        self._arch = arch
        self._cos_sin = dense.rotation(arch, tokens.shape[1]).to(device)
        windows = torch.split(tokens, max(1, BATCH_TOKENS // tokens.shape[1]))
        self._states = [dense.embed(static, batch).to(device) for batch in windows]
        self._layer: LayerTensors[Tensor] | None = None
        self._after: list[Tensor] | None = None  # behind the layer
        self._num_entered = 0

    def enter(self, layer: LayerTensors[Tensor]) -> None:
        """Goes on to the next layer, float32, leaving the one before."""
        if self._layer is not None:
            self.leave()
        self._layer = layer
        if not all(bool(x.isfinite().all()) for x in self._states):
            raise BadCheckpoint(
                f"what enters layer {self._num_entered} is not finite on the calibration text: "
                "the checkpoint is damaged or computes beyond float32"
            )
        self._num_entered += 1

    def leave(self) -> None:
        """Moves behind the layer and lets go of it."""
        self._states = self._behind()
        self._layer = self._after = None

    def inputs(self) -> LayerInputs:
        """Of the layer that was entered."""
        assert self._layer is not None
        return LayerInputs(self._states, self._layer, self._arch, self._cos_sin)

    def moments(self) -> Mapping[Linear, Tensor]:
        """Of each linear of the layer at full precision the mean over tokens of x x^T, [K, K]."""
        inputs = self.inputs()
        return {linear: inputs.of(linear).moments for linear in LINEARS}

    def output_error(self, variant: LayerTensors[Tensor]) -> float:
        """Norm of the change of the layer's output over the norm of what the layer adds."""
        change = added = 0.0
        for x, exact in zip(self._states, self._behind(), strict=True):
            ours = dense.decoder_layer(x, variant, self._arch, self._cos_sin)
            change += float((ours - exact).square().sum(dtype=torch.double))
            added += float((exact - x).square().sum(dtype=torch.double))
        return (change / added) ** 0.5 if added else 0.0

    def _behind(self) -> list[Tensor]:
        if self._after is None:
            assert self._layer is not None
            self._after = [
                dense.decoder_layer(x, self._layer, self._arch, self._cos_sin) for x in self._states
            ]
        return self._after


def _add_lower(total: Tensor, x: Tensor) -> None:
    """Adds x^T x, [K, K], in blocks that cover the lower triangle."""
    for start in range(0, len(total), _BLOCK):
        end = start + _BLOCK
        total[start:end, :end].addmm_(x[:, start:end].t(), x[:, :end])


def _mirror(total: Tensor) -> Tensor:
    """Fills the upper triangle from the lower one, in place."""
    for start in range(0, len(total), _BLOCK):
        end = start + _BLOCK
        total[:start, start:end] = total[start:end, :start].t()
    return total
