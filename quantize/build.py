"""Making a bundle: every layer of a checkpoint quantised and written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.calibration import Windows
from morphserve.quantize.checkpoint import BadCheckpoint, Checkpoint
from morphserve.quantize.layer_file import encode_layer
from morphserve.quantize.manifest import (
    FORMAT,
    SCHEMA,
    Base,
    Manifest,
    Quantization,
    Variant,
    VariantFiles,
)
from morphserve.quantize.rounding import Grid, dequantize, quantize_rtn
from morphserve.quantize.weights import LayerTensors, QuantizedWeight
from morphserve.quantize.workspace import open_workspace


@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """What `morph quantize` is told."""

    method: str = "gptq"  # of INT4: rtn, gptq, awq; INT8 is always rounded to nearest
    group_size: int = 128  # of INT4; INT8 has one scale per row
    symmetric: bool = True
    act_order: bool = True  # of gptq
    int8: bool = False  # whether INT8 variants are made beside INT4
    device: str = "cpu"


@dataclass(slots=True)
class _Error:
    """Sums over the linears of one layer."""

    squared_error: float = 0.0
    squared_weight: float = 0.0

    @property
    def relative(self) -> float:
        if self.squared_weight == 0:
            return 0.0
        return float((self.squared_error / self.squared_weight) ** 0.5)


def default_group_size(arch: Architecture) -> int:
    """Inputs that share a scale: fewer in small models, which rounding hurts more."""
    return 64 if arch.hidden_size < 2048 else 128


def _check_group_size(arch: Architecture, group_size: int) -> None:
    """Raises ConfigError unless groups fill every linear's inputs and kernels can read them."""
    if group_size < 32 or group_size & (group_size - 1):
        raise ConfigError(f"group size {group_size} must be a power of two of at least 32")
    for inputs in {arch.hidden_size, arch.q_size, arch.intermediate_size}:
        if inputs % group_size:
            raise ConfigError(
                f"group size {group_size} does not divide the {inputs} inputs of a linear: "
                "choose a smaller one, at least 32"
            )


def build_bundle(
    checkpoint: Checkpoint,
    folder: Path,
    settings: QuantizeSettings,
    windows: Windows | None = None,
    force: bool = False,
    resume: bool = False,
    on_layer: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Writes a bundle; `on_layer` is called after each layer.

    `windows` is the calibration text, which every method but rtn needs. What is at `folder` stays
    until the new bundle is whole: see `open_workspace` for `force` and `resume`.
    """
    arch = checkpoint.architecture
    _check_group_size(arch, settings.group_size)
    plan = _plan(checkpoint, settings, windows)
    with open_workspace(folder, plan, force, resume) as workspace:
        for i in range(workspace.num_finished, arch.num_layers):
            full = checkpoint.layer(i)
            written = {}
            for variant, files in plan.variants.items():
                how = files.quantization
                grid = Grid(how.bits, how.group_size, how.symmetric)
                layer, error = _quantize_rtn(checkpoint, i, full, grid)
                written[variant] = (encode_layer(layer, arch), error.relative, None)
            workspace.write(written)
            on_layer(i)
        return workspace.finish()


def _plan(checkpoint: Checkpoint, settings: QuantizeSettings, windows: Windows | None) -> Manifest:
    """The manifest of the bundle to be, without layers."""
    return Manifest(
        format=FORMAT,
        schema=SCHEMA,
        tool=f"morphserve {version('morphserve')}",
        base=Base(checkpoint.path.name, checkpoint.fingerprint()),
        architecture=checkpoint.architecture,
        variants={
            variant: VariantFiles(quantization, [])
            for variant, quantization in _quantizations(settings, windows).items()
        },
    )


def _quantizations(
    settings: QuantizeSettings, windows: Windows | None
) -> Mapping[Variant, Quantization]:
    int4 = Quantization(
        method=settings.method,
        bits=4,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        act_order=settings.method == "gptq" and settings.act_order,
        calibration=windows.sample if windows else None,
    )
    variants = {Variant.INT4: int4}
    if settings.int8:
        variants[Variant.INT8] = Quantization("rtn", 8, 0, symmetric=True)
    return variants


def _quantize_rtn(
    checkpoint: Checkpoint, i: int, full: LayerTensors[Tensor], grid: Grid
) -> tuple[LayerTensors[QuantizedWeight], _Error]:
    error = _Error()

    def quantize(weight: Tensor) -> QuantizedWeight:
        if not weight.isfinite().all():
            raise BadCheckpoint(f"layer {i} of {checkpoint.path} has weights that are not finite")
        rounded = quantize_rtn(weight, grid)
        exact = weight.float()
        error.squared_error += float((dequantize(rounded) - exact).square().sum(dtype=torch.double))
        error.squared_weight += float(exact.square().sum(dtype=torch.double))
        return rounded

    layer = LayerTensors(
        norms=full.norms,
        biases=full.biases,
        qkv=quantize(full.qkv),
        o=quantize(full.o),
        gate_up=quantize(full.gate_up),
        down=quantize(full.down),
    )
    return layer, error
