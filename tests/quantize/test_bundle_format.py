"""docs/bundle-format.md says what is in a bundle: its reader works and it names every field."""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import forgery
import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open

from morphserve.quantize import modules
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import read_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.layer_file import encode_layer
from morphserve.quantize.manifest import Manifest, Variant
from morphserve.quantize.packing import split
from morphserve.quantize.rounding import dequantize

DOCUMENT = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text("utf-8")


@pytest.fixture
def read_linear() -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[1], names)  # type: ignore[index]
    reader: Callable[..., Any] = names["read_linear"]
    return reader


def shuffled(folder: Path) -> None:
    """Gives the inputs of layer 0's down projection an order, as imported layers have."""
    bundle = read_bundle(str(folder))
    layer = bundle.layer(0)
    order = torch.randperm(layer.down.codes.shape[1])
    down = dataclasses.replace(layer.down, input_order=order)
    data = encode_layer(dataclasses.replace(layer, down=down), bundle.architecture)
    forgery.forge_file(folder, 0, lambda _: data)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_documents_reader_reads_every_linear(
    symmetric: bool,
    family: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    read_linear: Any,
) -> None:
    checkpoint = open_checkpoint(str(tiny_model(family)))
    folder = tmp_path / "tiny.morph"
    build_bundle(checkpoint, folder, QuantizeSettings("rtn", 32, symmetric=symmetric, int8=True))
    shuffled(folder)
    bundle = read_bundle(str(folder))
    for variant in (Variant.INT4, Variant.INT8):
        layer = bundle.layer(0, variant)
        for names, fused in (
            (modules.QKV, layer.qkv),
            (modules.OUTPUT, layer.o),
            (modules.GATE_UP, layer.gate_up),
            (modules.DOWN, layer.down),
        ):
            sizes = [modules.linear_shapes(bundle.architecture)[name][0] for name in names]
            for name, part in zip(names, split(fused, sizes), strict=True):
                found = read_linear(folder, 0, name, str(variant))
                assert found.dtype == np.float32
                assert np.array_equal(found, dequantize(part).numpy())


def test_the_documents_reader_notices_damage(
    tiny_bundle: Callable[[str], Path], tmp_path: Path, read_linear: Any
) -> None:
    folder = shutil.copytree(tiny_bundle("llama"), tmp_path / "bundle")
    read_linear(folder, 0, "mlp.up_proj")
    path = folder / "bundle.json"
    path.write_text(path.read_text().replace("tool", "TOOL"))
    with pytest.raises(AssertionError):
        read_linear(folder, 0, "mlp.up_proj")


def test_the_fingerprint_is_as_documented(family: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(family)
    checkpoint = open_checkpoint(str(folder))
    facts = msgspec.to_builtins(checkpoint.architecture)
    for name in ("dtype", "eos_token_ids", "max_position"):
        del facts[name]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    with safe_open(folder / "model.safetensors", framework="np") as file:
        for name in sorted(file.keys()):
            array = file.get_tensor(name)
            sha256 = hashlib.sha256(array.tobytes()).hexdigest()
            digest.update(f"{name} torch.{array.dtype} {array.shape} {sha256}\n".encode())
    assert digest.hexdigest() == checkpoint.fingerprint()


def fields(kind: Any) -> Iterator[str]:
    """Names of all fields of a type and of the types within it."""
    for inner in get_args(kind):
        yield from fields(inner)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            yield field.name
            yield from fields(field.type)
    elif dataclasses.is_dataclass(kind):
        hints = {field.name: field.type for field in dataclasses.fields(kind)}
        for name, hint in hints.items():
            yield name
            yield from fields(hint)


def test_every_field_is_documented() -> None:
    names = set(fields(Manifest)) | set(fields(Architecture))
    assert {"fingerprint", "theta", "curve", "rungs"} <= names
    assert [name for name in sorted(names) if f"`{name}`" not in DOCUMENT] == []


def test_a_bundle_holds_the_documented_files_and_tensors(
    tiny_bundle: Callable[[str], Path],
) -> None:
    folder = tiny_bundle("qwen3")
    assert sorted(path.name for path in folder.iterdir()) == [
        "bundle.json",
        *(f"layer-0000{i}.int4.safetensors" for i in range(3)),
    ]
    data = (folder / "layer-00000.int4.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for name in header:
        if name.endswith("norm.weight"):
            assert f"`{name}`" in DOCUMENT
        else:
            linear, _, end = name.rpartition(".")
            assert f"`{linear}`" in DOCUMENT and f"`{end}`" in DOCUMENT
