"""Quantised variants of one layer: made by any method, measured, ready to be written."""

import torch
from torch import Tensor

from morphserve.quantize import dense
from morphserve.quantize.awq import quantize_layer_awq, unfold
from morphserve.quantize.checkpoint import BadCheckpoint, Checkpoint
from morphserve.quantize.dense import LINEARS
from morphserve.quantize.gptq import quantize_layer_gptq
from morphserve.quantize.layer_file import encode_layer
from morphserve.quantize.manifest import Quantization
from morphserve.quantize.moments import Calibration
from morphserve.quantize.rounding import Grid, quantize_rtn
from morphserve.quantize.weights import Biases, LayerTensors, Norms, QuantizedWeight

RTN, GPTQ, AWQ = METHODS = ("rtn", "gptq", "awq")


class FullLayer:
    """A layer of the checkpoint in float32, and the calibration text in front of it."""

    def __init__(
        self, checkpoint: Checkpoint, i: int, device: str, calibration: Calibration | None
    ) -> None:
        """Moves the calibration, if there is one, from layer i - 1 to layer i."""
        stored = checkpoint.layer(i)
        if not all(bool(getattr(stored, linear).isfinite().all()) for linear in LINEARS):
            raise BadCheckpoint(f"layer {i} of {checkpoint.path} has weights that are not finite")
        self._norms, self._biases = stored.norms, stored.biases
        self._full = dense.to_float32(stored, device)
        self._arch = checkpoint.architecture
        self._device = device
        self._calibration = calibration
        if calibration:
            calibration.enter(self._full)

    def leave(self) -> None:
        """Moves the calibration behind the layer, which is let go of."""
        if self._calibration:
            self._calibration.leave()
        del self._full

    def quantize(self, how: Quantization) -> LayerTensors[QuantizedWeight]:
        """The variant that `how` describes, on the CPU, norms and biases of the stored dtypes."""
        layer = self._quantize(how, Grid(how.bits, how.group_size, how.symmetric))
        norms, biases = layer.norms, layer.biases
        stored_norms, stored_biases = self._norms, self._biases
        return LayerTensors(
            norms=Norms(
                norms.input.to(stored_norms.input),
                norms.post_attention.to(stored_norms.post_attention),
                stored_norms.q,
                stored_norms.k,
            ),
            biases=Biases(
                stored_biases.qkv,
                stored_biases.o,
                _like(biases.gate_up, stored_biases.gate_up),
                stored_biases.down,
            ),
            qkv=_to_cpu(layer.qkv),
            o=_to_cpu(layer.o),
            gate_up=_to_cpu(layer.gate_up),
            down=_to_cpu(layer.down),
        )

    def _quantize(self, how: Quantization, grid: Grid) -> LayerTensors[QuantizedWeight]:
        full, calibration = self._full, self._calibration
        if how.method == RTN:
            rounded = {linear: quantize_rtn(getattr(full, linear), grid) for linear in LINEARS}
            return LayerTensors(norms=full.norms, biases=full.biases, **rounded)
        assert calibration is not None
        if how.method == AWQ:
            return quantize_layer_awq(full, calibration.moments(), grid, self._norms)
        return quantize_layer_gptq(full, calibration.inputs(), grid, how.act_order)

    def measured(
        self, layer: LayerTensors[QuantizedWeight], how: Quantization
    ) -> tuple[bytes, float, float | None]:
        """The content of the file of a variant, its weight error and its output error."""
        ours = dense.quantized_to_float32(layer, self._device)
        output_error = self._calibration.output_error(ours) if self._calibration else None
        if how.method == AWQ or not _same_norms(ours.norms, self._full.norms):
            ours = unfold(ours, self._full)
        return encode_layer(layer, self._arch), _weight_error(ours, self._full), output_error


def _same_norms(ours: Norms, full: Norms) -> bool:
    """Whether no scales are folded out of norms; rounding to bfloat16 changes them too."""
    pairs = (ours.input, full.input), (ours.post_attention, full.post_attention)
    return all(torch.allclose(a, b, rtol=2**-7, atol=0) for a, b in pairs)


def _weight_error(ours: LayerTensors[Tensor], full: LayerTensors[Tensor]) -> float:
    """Norm of the rounding error over norm of the weights, all linears."""
    error = size = 0.0
    for linear in LINEARS:
        exact: Tensor = getattr(full, linear)
        error += float((getattr(ours, linear) - exact).square().sum(dtype=torch.double))
        size += float(exact.square().sum(dtype=torch.double))
    return float((error / size) ** 0.5) if size else 0.0


def _like(tensor: Tensor | None, stored: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or stored is None else tensor.to(stored)


def _to_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(
        codes=weight.codes.cpu(),
        scales=weight.scales.cpu(),
        group_size=weight.group_size,
        bits=weight.bits,
        zeros=None if weight.zeros is None else weight.zeros.cpu(),
    )
