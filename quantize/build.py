"""Making a bundle: every layer of a checkpoint quantised and written."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from morphserve.configs.errors import ConfigError
from morphserve.configs.version import version
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.calibration import Windows
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.manifest import (
    FORMAT,
    SCHEMA,
    Base,
    Manifest,
    Quantization,
    Variant,
    VariantFiles,
)
from morphserve.quantize.moments import Calibration
from morphserve.quantize.variants import GPTQ, METHODS, RTN, FullLayer
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


class Source(Protocol):
    """Layers that were quantised elsewhere."""

    @property
    def quantization(self) -> Quantization: ...

    def layer(self, i: int) -> LayerTensors[QuantizedWeight]:
        """Fused, with norms and biases of its own. Raises MorphError where it cannot serve."""


def default_group_size(arch: Architecture) -> int:
    """Inputs that share a scale: fewer in small models, which rounding hurts more."""
    return 64 if arch.hidden_size < 2048 else 128


def _check_group_size(arch: Architecture, group_size: int) -> None:
    """Raises ConfigError unless groups fill every linear's inputs and kernels can read them."""
    if not _can_serve(group_size):
        raise ConfigError(f"group size {group_size} must be a power of two of at least 32")
    for inputs in {arch.hidden_size, arch.q_size, arch.intermediate_size}:
        if inputs % group_size:
            raise ConfigError(
                f"group size {group_size} does not divide the {inputs} inputs of a linear: "
                "choose a smaller one, at least 32"
            )


def _can_serve(group_size: int) -> bool:
    """Whether kernels find an input's group by a shift, and groups fill their steps."""
    return group_size >= 32 and not group_size & (group_size - 1)


def build_bundle(
    checkpoint: Checkpoint,
    folder: Path,
    settings: QuantizeSettings,
    windows: Windows | None = None,
    force: bool = False,
    resume: bool = False,
    on_layer: Callable[[int], None] = lambda _: None,
    imported: Source | None = None,
) -> Manifest:
    """Writes a bundle, one layer in memory at a time; `on_layer` is told the last one finished.

    `windows` is the calibration text: gptq and awq need it, and output errors are measured on it.
    INT4 layers of `imported` are written as they are. What is at `folder` stays until the new
    bundle is whole: see `open_workspace` for `force` and `resume`. A build that is resumed runs
    the text through its finished layers again, and ends with the same bytes.
    """
    arch = checkpoint.architecture
    check(arch, settings, windows, imported)
    plan = _plan(checkpoint, plan_variants(settings, windows, imported))
    with torch.inference_mode(), open_workspace(folder, plan, force, resume) as workspace:
        first = workspace.num_finished
        if first:
            on_layer(first - 1)
        calibration = None
        if windows and first < arch.num_layers:
            calibration = Calibration(checkpoint.static(), arch, windows.tokens, settings.device)
        for i in range(0 if calibration else first, arch.num_layers):
            layer = FullLayer(checkpoint, i, settings.device, calibration)
            if i >= first:
                workspace.write(_variants(layer, i, plan, imported))
                on_layer(i)
            layer.leave()
        return workspace.finish()


def _variants(
    layer: FullLayer, i: int, plan: Manifest, imported: Source | None
) -> dict[Variant, tuple[bytes, float, float | None]]:
    """What the workspace wants of each variant of layer `i`."""
    written = {}
    for variant, files in plan.variants.items():
        how = files.quantization
        made = imported.layer(i) if imported and how.source else layer.quantize(how)
        written[variant] = layer.measured(made, how)
    return written


def check(
    arch: Architecture, settings: QuantizeSettings, windows: Windows | None, imported: Source | None
) -> None:
    """Raises ConfigError for what cannot be built."""
    if imported is None:
        if settings.method not in METHODS:
            raise ConfigError(
                f"there is no method {settings.method!r}: choose one of {', '.join(METHODS)}"
            )
        if settings.method != RTN and windows is None:
            raise ConfigError(
                f"{settings.method} needs calibration text: give it some, or choose {RTN}"
            )
        _check_group_size(arch, settings.group_size)
    else:
        _check_imported(imported.quantization)
    _check_device(settings.device)


def _check_imported(how: Quantization) -> None:
    if how.bits != 4:
        raise ConfigError(
            f"{how.source} has {how.bits}-bit weights, and a bundle needs INT4 layers: "
            "give one of 4 bits"
        )
    if how.group_size and not _can_serve(how.group_size):
        raise ConfigError(
            f"{how.source} has groups of {how.group_size} inputs, which cannot be served: give one "
            "with groups of a power of two of at least 32, or with one group per row"
        )


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"device {device!r} cannot be used: choose cpu, cuda or cuda:N")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used: {reason}") from error


def _plan(checkpoint: Checkpoint, quantizations: Mapping[Variant, Quantization]) -> Manifest:
    """The manifest of the bundle to be, without layers."""
    return Manifest(
        format=FORMAT,
        schema=SCHEMA,
        tool=f"morphserve {version()}",
        base=Base(checkpoint.path.name, checkpoint.fingerprint()),
        architecture=checkpoint.architecture,
        variants={variant: VariantFiles(how, []) for variant, how in quantizations.items()},
    )


def plan_variants(
    settings: QuantizeSettings, windows: Windows | None, imported: Source | None
) -> Mapping[Variant, Quantization]:
    """How each variant of the bundle will be made."""
    sample = windows.sample if windows else None
    if imported is not None:
        variants = {
            Variant.INT4: msgspec.structs.replace(imported.quantization, calibration=sample)
        }
    else:
        variants = {
            Variant.INT4: Quantization(
                method=settings.method,
                bits=4,
                group_size=settings.group_size,
                symmetric=settings.symmetric,
                act_order=settings.method == GPTQ and settings.act_order,
                calibration=sample,
            )
        }
    if settings.int8:
        variants[Variant.INT8] = Quantization(RTN, 8, 0, symmetric=True, calibration=sample)
    return variants
