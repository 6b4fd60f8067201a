"""A bundle: the folder of quantised layer variants and their ranking, made for one checkpoint."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from morphserve.quantize import modules
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.checkpoint import Checkpoint, read_biases, read_norms
from morphserve.quantize.files import BadFile, encode_tensors, parse_tensors, write_atomically
from morphserve.quantize.manifest import (
    LayerFile,
    Manifest,
    Quantization,
    Ranking,
    Variant,
    VariantFiles,
    decode,
    encode,
)
from morphserve.quantize.packing import fuse, pack, split, unpack
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

MANIFEST = "bundle.json"
_PACKED = {
    "qweight": torch.int32,
    "scales": torch.float16,
    "qzeros": torch.int32,
    "g_idx": torch.int32,
}


class BadBundle(BadFile):
    """The bundle is missing, unfinished, damaged, or belongs to another checkpoint."""


class Bundle:
    """Layers are read anew, into memory of their own, and checked each time they are asked for."""

    def __init__(self, path: Path, architecture: Architecture, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._architecture = architecture

    @property
    def num_layers(self) -> int:
        return self._architecture.num_layers

    @property
    def order(self) -> list[int]:
        """Layer ids, first to be demoted first; front to back until `morph profile` ran."""
        ranking = self.manifest.ranking
        if ranking is None:
            return list(range(self.num_layers))
        return next(order.layers for order in ranking.orders if order.name == ranking.chosen)

    def layer(self, i: int, variant: Variant = Variant.INT4) -> LayerTensors[QuantizedWeight]:
        """A variant of layer `i`, q, k, v and gate, up fused, with norms and biases.

        Raises BadBundle if the file is not, byte for byte, the one that was written.
        """
        files = self.manifest.variants[variant]
        tensors = self._read(files, i)

        def linear(names: tuple[str, ...]) -> QuantizedWeight:
            parts = [
                unpack({end: tensors[f"{name}.{end}"] for end in ends(name)}, bits)
                for name in names
            ]
            return fuse(parts)

        def ends(name: str) -> list[str]:
            return [end for end in _PACKED if f"{name}.{end}" in tensors]

        bits = files.quantization.bits
        return LayerTensors(
            norms=read_norms(tensors),
            biases=read_biases(tensors),
            qkv=linear(modules.QKV),
            o=linear(modules.OUTPUT),
            gate_up=linear(modules.GATE_UP),
            down=linear(modules.DOWN),
        )

    def with_ranking(self, ranking: Ranking) -> "Bundle":
        """This bundle with the ranking stored in its folder."""
        manifest = msgspec.structs.replace(self.manifest, ranking=ranking)
        write_manifest(self.path, manifest)
        return Bundle(self.path, self._architecture, manifest)

    def _read(self, files: VariantFiles, i: int) -> dict[str, Tensor]:
        fact = files.layers[i]
        path = self.path / fact.name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadBundle(f"cannot read {path}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != fact.sha256:
            raise BadBundle(f"{path} is damaged (its sha256 does not match): {_rebuild(self.path)}")
        tensors = parse_tensors(path, data)
        _check_tensors(path, tensors, self._architecture, files.quantization)
        return tensors


def open_bundle(path: str, checkpoint: Checkpoint) -> Bundle:
    """The bundle in a folder; every file must have its size and be made for `checkpoint`.

    Contents are checked against their sha256 when a layer is read. Comparing fingerprints reads
    whatever tensors of the checkpoint have not been read yet.
    """
    folder = Path(path).expanduser()
    manifest = _read_manifest(folder)
    if manifest.base.fingerprint != checkpoint.fingerprint():
        raise BadBundle(
            f"{folder} was built from another checkpoint ({manifest.base.name}) than "
            f"{checkpoint.path}: run `morph quantize {checkpoint.path}`"
        )
    for variant, files in manifest.variants.items():
        if len(files.layers) != checkpoint.architecture.num_layers:
            raise BadBundle(f"{folder} does not hold every {variant} layer: {_rebuild(folder)}")
        for i, fact in enumerate(files.layers):
            _check_file(folder, i, variant, fact)
    return Bundle(folder, checkpoint.architecture, manifest)


def _read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise BadBundle(f"there is no bundle {folder}: make it with `morph quantize`")
    path = folder / MANIFEST
    if not path.exists():
        raise BadBundle(f"{folder} is not a finished bundle (no {MANIFEST}): {_rebuild(folder)}")
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise BadBundle(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # msgspec's decoding errors are ValueErrors too
        raise BadBundle(f"{path} cannot be used ({error}): {_rebuild(folder)}") from error


def _check_file(folder: Path, layer: int, variant: Variant, fact: LayerFile) -> None:
    path = folder / fact.name
    if fact.name != layer_file_name(layer, variant):
        raise BadBundle(f"{folder / MANIFEST} names a wrong file for layer {layer}: {fact.name!r}")
    if not path.is_file():
        raise BadBundle(f"{path} is missing: {_rebuild(folder)}")
    num_bytes = path.stat().st_size
    if num_bytes != fact.num_bytes:
        raise BadBundle(
            f"{path} has {num_bytes} bytes instead of {fact.num_bytes}: {_rebuild(folder)}"
        )


def _rebuild(folder: Path) -> str:
    return f"run `morph quantize MODEL --output {folder} --force` to build it again"


def _check_tensors(
    path: Path, tensors: Mapping[str, Tensor], arch: Architecture, how: Quantization
) -> None:
    per_word = 32 // how.bits
    expected: dict[str, tuple[int, ...]] = dict(modules.vector_shapes(arch))
    for name, (outputs, inputs) in modules.linear_shapes(arch).items():
        groups = inputs // (how.group_size or inputs)
        expected[f"{name}.qweight"] = (inputs // per_word, outputs)
        expected[f"{name}.scales"] = (groups, outputs)
        if not how.symmetric:
            expected[f"{name}.qzeros"] = (groups, outputs // per_word)
        if f"{name}.g_idx" in tensors:
            expected[f"{name}.g_idx"] = (inputs,)
            _check_groups(path, name, tensors[f"{name}.g_idx"], groups)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise BadBundle(f"{path} does not hold the tensors of a {arch.family} layer")
    for name, tensor in tensors.items():
        wanted = _PACKED.get(name.rpartition(".")[2])
        if wanted is not None and tensor.dtype != wanted:
            raise BadBundle(f"{name} in {path} is {tensor.dtype}, not {wanted}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadBundle(f"{name} in {path} has values that are not finite")


def _check_groups(path: Path, linear: str, group_of: Tensor, groups: int) -> None:
    counts = torch.bincount(group_of.clamp(min=0), minlength=groups)
    if len(counts) != groups or len(set(counts.tolist())) != 1 or int(group_of.min()) < 0:
        raise BadBundle(f"{linear}.g_idx in {path} does not put as many inputs into each group")


def layer_file_name(layer: int, variant: Variant) -> str:
    return f"layer-{layer:05d}.{variant}.safetensors"


def encode_layer(layer: LayerTensors[QuantizedWeight], arch: Architecture) -> bytes:
    """The content of the file of a layer's variant: linears unfused, packed."""
    return encode_tensors(_named_tensors(layer, arch))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes the folder a bundle; every layer file must be there."""
    write_atomically(folder / MANIFEST, encode(manifest))


def _named_tensors(layer: LayerTensors[QuantizedWeight], arch: Architecture) -> dict[str, Tensor]:
    named: dict[str, Tensor | None] = {
        modules.INPUT_NORM: layer.norms.input,
        modules.POST_ATTENTION_NORM: layer.norms.post_attention,
        modules.Q_NORM: layer.norms.q,
        modules.K_NORM: layer.norms.k,
    }
    biases = layer.biases
    for names, weight, bias in (
        (modules.QKV, layer.qkv, biases.qkv),
        (modules.OUTPUT, layer.o, biases.o),
        (modules.GATE_UP, layer.gate_up, biases.gate_up),
        (modules.DOWN, layer.down, biases.down),
    ):
        sizes = [modules.linear_shapes(arch)[name][0] for name in names]
        for name, part in zip(names, split(weight, sizes), strict=True):
            named |= {f"{name}.{end}": tensor for end, tensor in pack(part).items()}
        if bias is not None:
            parts = torch.split(bias, sizes)
            named |= {f"{name}.bias": part for name, part in zip(names, parts, strict=True)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
