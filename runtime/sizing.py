"""What serving a model takes, told without reading its weights: tensors without content."""

import torch
from torch import Tensor

from morphserve.configs.schema import EngineConfig
from morphserve.quantize import modules
from morphserve.quantize.bundle import BadBundle, Bundle, read_bundle
from morphserve.quantize.checkpoint import (
    Checkpoint,
    collect_entries,
    open_checkpoint,
    read_biases,
    read_norms,
)
from morphserve.quantize.files import read_entries
from morphserve.quantize.manifest import Quantization, Variant
from morphserve.quantize.weights import LayerTensors, QuantizedWeight, StaticTensors
from morphserve.runtime.loader import LoadedModel, load_model


def outline_model(config: EngineConfig) -> LoadedModel:
    """As `load_model`, but of images that have sizes and no content; only headers are read.

    Whether the bundle was made from this very checkpoint is not known then, only that the two are
    of one architecture.
    """
    with torch.device("meta"):
        return load_model(config, _outline_checkpoint, _outline_bundle)


class _OutlinedCheckpoint(Checkpoint):
    """Its tensors have shapes and dtypes, and no content."""

    def static(self) -> StaticTensors:
        embedding = self._read(modules.EMBEDDING)
        head = embedding if self.architecture.tied_head else self._read(modules.HEAD)
        return StaticTensors(embedding, self._read(modules.FINAL_NORM), head)

    def _read(self, name: str) -> Tensor:
        entry = self._entries[name]
        return torch.empty(entry.shape, dtype=entry.dtype)


class _OutlinedBundle(Bundle):
    """Its layers are known from the manifest and the headers of its files."""

    def layer(self, i: int, variant: Variant = Variant.INT4) -> LayerTensors[QuantizedWeight]:
        files = self.manifest.variants[variant]
        entries = read_entries(self.path / files.layers[i].name)
        arch, how = self.architecture, files.quantization
        vectors = {name: torch.empty(shape) for name, shape in modules.vector_shapes(arch).items()}

        def linear(names: tuple[str, ...]) -> QuantizedWeight:
            shapes = [modules.linear_shapes(arch)[name] for name in names]
            is_ordered = f"{names[0]}.g_idx" not in entries
            return _weight(sum(n for n, _ in shapes), shapes[0][1], how, is_ordered)

        return LayerTensors(
            norms=read_norms(vectors),
            biases=read_biases(vectors),
            qkv=linear(modules.QKV),
            o=linear(modules.OUTPUT),
            gate_up=linear(modules.GATE_UP),
            down=linear(modules.DOWN),
        )


def _weight(outputs: int, inputs: int, how: Quantization, is_ordered: bool) -> QuantizedWeight:
    group = how.group_size or inputs
    groups = outputs, inputs // group
    return QuantizedWeight(
        codes=torch.empty(outputs, inputs, dtype=torch.uint8),
        scales=torch.empty(groups, dtype=torch.float16),
        group_size=group,
        bits=how.bits,
        zeros=None if how.symmetric else torch.empty(groups, dtype=torch.uint8),
        input_order=None if is_ordered else torch.empty(inputs, dtype=torch.int64),
    )


def _outline_checkpoint(path: str) -> Checkpoint:
    found = open_checkpoint(path)
    return _OutlinedCheckpoint(found.path, found.architecture, collect_entries(found.path))


def _outline_bundle(path: str, checkpoint: Checkpoint) -> Bundle:
    found = read_bundle(path)
    if found.architecture != checkpoint.architecture:
        raise BadBundle(
            f"{path} was built from another checkpoint ({found.manifest.base.name}) than "
            f"{checkpoint.path}: run `morph quantize {checkpoint.path}`"
        )
    found.check_files()
    return _OutlinedBundle(found.path, found.manifest)
