"""Making a bundle: every layer of a checkpoint rounded to INT4 and written."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.bundle import MANIFEST, write_layer, write_manifest
from morphserve.quantize.checkpoint import BadCheckpoint, Checkpoint
from morphserve.quantize.files import BadFile
from morphserve.quantize.int4 import dequantize, quantize_rtn
from morphserve.quantize.manifest import FORMAT, SCHEMA, Base, LayerFile, Manifest, Quantization
from morphserve.quantize.weights import Int4Weight, LayerTensors


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


def _prepare_folder(folder: Path, force: bool) -> None:
    """Makes `folder`; a bundle in it becomes unfinished with `force` and is an error without.

    A folder that holds anything else is refused: a bundle must not spill among other files.
    """
    manifest = folder / MANIFEST
    if folder.is_dir() and any(not _is_ours(path.name) for path in folder.iterdir()):
        raise ConfigError(f"{folder} holds other files than a bundle's: choose another --output")
    if manifest.exists() and not force:
        raise ConfigError(f"{folder} holds a bundle already: pass --force to replace it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)
    except OSError as error:
        raise BadFile(f"cannot write to {folder}: {error.strerror}") from error


def _is_ours(name: str) -> bool:
    """Whether `quantize` or `profile` may have written this file, finished or not."""
    return name == MANIFEST or name.lstrip(".").startswith(("layer-", MANIFEST))


def build_bundle(
    checkpoint: Checkpoint,
    folder: Path,
    group_size: int,
    force: bool = False,
    on_layer: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Writes a bundle of round-to-nearest INT4 layers; `on_layer` is called after each.

    The folder is a bundle only when this has returned: the manifest is written last. A bundle that
    is there is replaced only with `force`.
    """
    arch = checkpoint.architecture
    _check_group_size(arch, group_size)
    _prepare_folder(folder, force)
    files: list[LayerFile] = []
    for i in range(arch.num_layers):
        files.append(_build_layer(checkpoint, folder, i, group_size))
        on_layer(i)
    manifest = Manifest(
        format=FORMAT,
        schema=SCHEMA,
        tool=f"morphserve {version('morphserve')}",
        base=Base(checkpoint.path.name, checkpoint.fingerprint()),
        architecture=asdict(arch),
        quantization=Quantization("rtn", group_size),
        layers=files,
    )
    write_manifest(folder, manifest)
    return manifest


def _build_layer(checkpoint: Checkpoint, folder: Path, i: int, group_size: int) -> LayerFile:
    full = checkpoint.layer(i)
    error = _Error()

    def quantize(weight: Tensor) -> Int4Weight:
        if not weight.isfinite().all():
            raise BadCheckpoint(f"layer {i} of {checkpoint.path} has weights that are not finite")
        rounded = quantize_rtn(weight, group_size)
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
    return write_layer(folder, i, layer, checkpoint.architecture, error.relative)
