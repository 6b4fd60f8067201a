"""Bundles changed with their checksums put right, as a faulty or hostile writer would."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import safetensors.torch
from torch import Tensor

from morphserve.quantize.manifest import LayerFile, Manifest, Variant, VariantFiles, decode, encode


def forge_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    path = folder / "bundle.json"
    path.write_bytes(encode(change(decode(path.read_bytes()))))


def forge_file(folder: Path, layer: int, change: Callable[[bytes], bytes]) -> Path:
    """The INT4 file of a layer with other content."""
    path = folder / f"layer-{layer:05d}.int4.safetensors"
    data = change(path.read_bytes())
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()

    def restate(fact: LayerFile) -> LayerFile:
        return msgspec.structs.replace(fact, num_bytes=len(data), sha256=digest)

    forge_fact(folder, layer, restate)
    return path


def forge_fact(folder: Path, layer: int, change: Callable[[LayerFile], LayerFile]) -> None:
    """What the manifest says of the INT4 file of a layer."""

    def replace(manifest: Manifest) -> Manifest:
        files = manifest.variants[Variant.INT4]
        facts = [change(fact) if i == layer else fact for i, fact in enumerate(files.layers)]
        int4 = VariantFiles(files.quantization, facts)
        return msgspec.structs.replace(manifest, variants={**manifest.variants, Variant.INT4: int4})

    forge_manifest(folder, replace)


def forge_tensors(folder: Path, layer: int, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The INT4 file of a layer with other tensors."""

    def edit(data: bytes) -> bytes:
        tensors = safetensors.torch.load(data)
        change(tensors)
        return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})

    return forge_file(folder, layer, edit)
