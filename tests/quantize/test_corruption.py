"""A bundle that was damaged, or written wrong, is refused by name with a way out."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forgery
import msgspec
import pytest
import torch
from torch import Tensor

from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import BadBundle, open_bundle
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.manifest import (
    Ladder,
    LayerFile,
    LayerScores,
    Manifest,
    Quantization,
    RankedOrder,
    Ranking,
    Rung,
    TextSample,
    Variant,
    VariantFiles,
)
from morphserve.quantize.verify import verify_layers

Q = "self_attn.q_proj"


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(str(tiny_model("llama")))


@pytest.fixture
def folder(tiny_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle("llama"), tmp_path / "bundle")


def refusal(folder: Path, checkpoint: Checkpoint) -> str:
    """What is said when the bundle is opened and every layer read."""
    with pytest.raises(BadBundle) as caught:
        bundle = open_bundle(str(folder), checkpoint)
        for i in range(bundle.num_layers):
            bundle.layer(i)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.int4.safetensors"


def test_a_flipped_bit_anywhere(checkpoint: Checkpoint, folder: Path) -> None:
    path = layer_file(folder, 1)
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 17):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        message = refusal(folder, checkpoint)
        assert f"{path} is damaged" in message and "run `morph quantize" in message


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_a_truncated_file(checkpoint: Checkpoint, folder: Path, kept: int) -> None:
    path = layer_file(folder, 2)
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(folder, checkpoint)
    assert f"{path} has " in message and "bytes instead of" in message
    assert "run `morph quantize" in message


def test_a_missing_file(checkpoint: Checkpoint, folder: Path) -> None:
    layer_file(folder, 2).unlink()
    assert f"{layer_file(folder, 2)} is missing; run `morph quantize" in refusal(folder, checkpoint)


def test_a_file_that_shrinks_while_the_bundle_is_open(checkpoint: Checkpoint, folder: Path) -> None:
    bundle = open_bundle(str(folder), checkpoint)
    os.truncate(layer_file(folder, 0), 1000)
    with pytest.raises(BadBundle, match="has 1000 bytes instead of"):
        bundle.layer(0)


def test_files_swapped_between_layers(checkpoint: Checkpoint, folder: Path) -> None:
    a, b = layer_file(folder, 0), layer_file(folder, 1)
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    assert f"{a} is damaged (it holds the content of {b.name})" in refusal(folder, checkpoint)


def test_layers_swapped_with_their_checksums_disagree_with_the_model(
    checkpoint: Checkpoint, folder: Path
) -> None:
    first, second = layer_file(folder, 0).read_bytes(), layer_file(folder, 1).read_bytes()
    forgery.forge_file(folder, 0, lambda _: second)
    forgery.forge_file(folder, 1, lambda _: first)
    bundle = open_bundle(str(folder), checkpoint)
    assert all(check.fault is None for check in verify_layers(bundle))
    faults = [check.fault for check in verify_layers(bundle, checkpoint, floor=0.9)]
    assert "cosine" in str(faults[0]) and "cosine" in str(faults[1]) and faults[2] is None


def nan_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.scales"][1, 2] = torch.nan


def order_of(values: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{Q}.g_idx": values.int()})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.update(extra=torch.zeros(2)), "holds tensor extra, which a llama layer"),
        (lambda t: t.pop(f"{Q}.scales"), f"lacks tensor {Q}.scales"),
        (
            lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:0]}),
            r"scales in .* has shape \[0, 64\], not \[2, 64\]",
        ),
        (nan_scale, f"{Q}.scales in .* has values that are not finite"),
        (
            lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}),
            f"{Q}.scales in .* is float32, not float16",
        ),
        (
            lambda t: t.update({"input_layernorm.weight": torch.zeros(64).int()}),
            "input_layernorm.weight in .* is int32, not float32",
        ),
        (
            lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:-1]}),
            r"qweight in .* has shape \[7, 64\], not \[8, 64\]",
        ),
        (order_of(torch.arange(64) // 32 + 1), "names groups beyond the 2 there are"),
        (order_of(torch.arange(64) // 32 - 1), "names groups beyond the 2 there are"),
        (order_of(torch.full((64,), 2**31 - 1)), "names groups beyond the 2 there are"),
        (order_of(torch.arange(64) // 40), "does not put as many inputs into each group"),
        (order_of(torch.arange(64) % 2), "has another order of inputs than"),
    ],
    ids=str,
)
def test_tensors_that_are_not_a_layers(
    checkpoint: Checkpoint,
    folder: Path,
    change: Callable[[dict[str, Tensor]], object],
    reason: str,
) -> None:
    path = forgery.forge_tensors(folder, 1, change)
    message = refusal(folder, checkpoint)
    assert str(path) in message and "run `morph quantize" in message
    assert re.search(reason, message), message


def with_header(change: Callable[[dict[str, Any]], str]) -> Callable[[bytes], bytes]:
    def rewrite(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = change(json.loads(data[8:end])).encode()
        return len(header).to_bytes(8, "little") + header + data[end:]

    return rewrite


def twice(table: dict[str, Any]) -> str:
    name = f"{Q}.scales"
    return f'{{"{name}": {json.dumps(table[name])}, {json.dumps(table)[1:]}'


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_header(twice), f"{Q}.scales is listed twice"),
        (lambda data: (10**12).to_bytes(8, "little") + data[8:], "not a whole safetensors file"),
        (lambda data: data + b"more", "longer than its header says"),
        (lambda data: data[:-4], "truncated"),
        (lambda _: b"", "not a whole safetensors file"),
    ],
    ids=["duplicate name", "oversized header", "trailing bytes", "short data", "empty"],
)
def test_headers_that_lie(
    checkpoint: Checkpoint, folder: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    path = forgery.forge_file(folder, 1, change)
    message = refusal(folder, checkpoint)
    assert str(path) in message and reason in message and "run `morph quantize" in message


def test_every_edited_character_of_the_manifest(checkpoint: Checkpoint, folder: Path) -> None:
    path = folder / "bundle.json"
    whole = path.read_bytes()
    for place in range(1, len(whole) - 2, 53):
        changed = bytearray(whole)
        changed[place] = ord("8" if whole[place : place + 1] != b"8" else "9")
        path.write_bytes(changed)
        message = refusal(folder, checkpoint)
        assert f"{path} cannot be used" in message and "run `morph quantize" in message


@pytest.mark.parametrize("kept", [0, 1, 40, -2, -30])
def test_a_truncated_manifest(checkpoint: Checkpoint, folder: Path, kept: int) -> None:
    path = folder / "bundle.json"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} cannot be used" in refusal(folder, checkpoint)


def a_ranking(layers: list[int], chosen: str = "lis") -> dict[str, Any]:
    text = TextSample("some.txt, first half", "00", 1, 16, 0)
    order = RankedOrder("lis", layers, [0.5, 0.25, 0.125], [0.1], [1.5], [0.1])
    scores = [LayerScores({Variant.INT4: 8}, {Variant.INT4: 0.1})] * 3
    return {"ranking": Ranking(text, text, text, [0], scores, [order], chosen)}


def of_ranking(**changes: Any) -> Callable[[Manifest], dict[str, Any]]:
    ranking: Ranking = a_ranking([0, 1, 2])["ranking"]
    return lambda _: {"ranking": msgspec.structs.replace(ranking, **changes)}


def of_order(**changes: Any) -> Callable[[Manifest], dict[str, Any]]:
    (order,) = a_ranking([0, 1, 2])["ranking"].orders
    return of_ranking(orders=[msgspec.structs.replace(order, **changes)])


RUNG = Rung(0, Variant.INT4)
STEPS = [Rung(i, to) for to in (Variant.INT8, Variant.INT4) for i in range(3)]


def a_ladder(*rungs: Rung) -> Ladder:
    return Ladder("x", list(rungs), [0] * len(rungs), [0.0] * len(rungs))


def of_int4(**changes: Any) -> Callable[[Manifest], dict[str, Any]]:
    def change(manifest: Manifest) -> dict[str, Any]:
        files = manifest.variants[Variant.INT4]
        how: Quantization = msgspec.structs.replace(files.quantization, **changes)
        return {"variants": {Variant.INT4: VariantFiles(how, files.layers)}}

    return change


def without_last_layer(manifest: Manifest) -> dict[str, Any]:
    files = manifest.variants[Variant.INT4]
    return {"variants": {Variant.INT4: VariantFiles(files.quantization, files.layers[:-1])}}


def of_architecture(**changes: Any) -> Callable[[Manifest], dict[str, Any]]:
    return lambda manifest: {"architecture": replace(manifest.architecture, **changes)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: {"schema": 1}, "its schema is 1, this program reads 2"),
        (lambda _: {"schema": 3}, "its schema is 3, this program reads 2"),
        (lambda _: {"format": "zip"}, "its format is 'zip'"),
        (lambda _: {"variants": {}}, "its variants must be int4 and, if wanted, int8"),
        (lambda _: a_ranking([0, 1, 1]), "does not hold every layer once"),
        (lambda _: a_ranking([0, 1, 3]), "does not hold every layer once"),
        (lambda _: a_ranking([0, 1, 2], "best"), "the order it chose is not in its ranking"),
        (of_ranking(replaced=[0, 1]), "lacks scores or costs, or has too many"),
        (of_ranking(layers=[]), "does not hold scores of every layer"),
        (of_order(scores=[0.5]), "lacks scores or costs, or has too many"),
        (of_order(selection_divergence=[]), "lacks scores or costs, or has too many"),
        (of_order(perplexity=[1.5, 1.6]), "lacks scores or costs, or has too many"),
        (of_order(divergence=[]), "lacks scores or costs, or has too many"),
        (of_ranking(ladder=Ladder("x", [RUNG], [], [0.1])), "the ladder in its ranking lacks"),
        (of_ranking(ladder=Ladder("x", [RUNG], [8], [])), "the ladder in its ranking lacks"),
        (of_ranking(ladder=a_ladder(Rung(3, Variant.INT4))), "does not take each layer to int8"),
        (of_ranking(ladder=a_ladder(*reversed(STEPS))), "does not take each layer to int8"),
        (of_ranking(ladder=a_ladder(*STEPS)), "has a ladder through int8, which it lacks"),
        (of_int4(bits=8), "its int4 variant has 8 bits"),
        (of_int4(group_size=-32), "its int4 variant has a negative group size"),
        (of_int4(group_size=0), "has shape"),
        (of_int4(symmetric=False), "lacks tensor"),
        (without_last_layer, "does not hold every int4 layer"),
        (of_architecture(hidden_size=0), "sizes that are not positive"),
        (of_architecture(hidden_size=128), "has shape"),
        (of_architecture(num_layers="3"), "Expected `int`"),
    ],
    ids=str,
)
def test_manifests_that_make_no_sense(
    checkpoint: Checkpoint,
    folder: Path,
    change: Callable[[Manifest], dict[str, Any]],
    reason: str,
) -> None:
    forgery.forge_manifest(folder, lambda m: msgspec.structs.replace(m, **change(m)))
    message = refusal(folder, checkpoint)
    assert reason in message and "run `morph quantize" in message


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "layer-00000.int4.safetensors", ""]
)
def test_names_that_lead_elsewhere(checkpoint: Checkpoint, folder: Path, name: str) -> None:
    def rename(fact: LayerFile) -> LayerFile:
        return msgspec.structs.replace(fact, name=name)

    forgery.forge_fact(folder, 1, rename)
    assert f"names a wrong file for layer 1 ({name!r})" in refusal(folder, checkpoint)


@pytest.mark.parametrize("name", ["layer-00001.int4.safetensors", "bundle.json"])
def test_links(checkpoint: Checkpoint, folder: Path, tmp_path: Path, name: str) -> None:
    elsewhere = shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(elsewhere)
    assert f"{folder / name} is a link" in refusal(folder, checkpoint)


def test_an_unknown_fact_of_the_architecture(checkpoint: Checkpoint, folder: Path) -> None:
    path = folder / "bundle.json"
    manifest = json.loads(path.read_bytes())
    manifest["architecture"]["experts"] = 8
    bare = json.dumps(manifest | {"checksum": ""})
    digest = hashlib.sha256(bare.encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"checksum": digest}))
    assert "its architecture does not hold exactly" in refusal(folder, checkpoint)


def test_a_bundle_that_was_built_anew_keeps_its_own_manifest(
    checkpoint: Checkpoint, folder: Path
) -> None:
    """A ranking that took hours to compute must not overwrite what was built meanwhile."""
    opened = open_bundle(str(folder), checkpoint)
    build_bundle(checkpoint, folder, QuantizeSettings("rtn", 64), force=True)
    with pytest.raises(BadBundle, match="was built anew meanwhile"):
        opened.with_ranking(a_ranking([0, 1, 2])["ranking"])
    assert open_bundle(str(folder), checkpoint).manifest.ranking is None


def test_files_that_may_not_be_looked_at(
    checkpoint: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def deny(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path.name == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", deny)
    for denied in ("bundle.json", "layer-00001.int4.safetensors"):
        message = refusal(folder, checkpoint)
        assert f"cannot read {folder / denied}" in message and "Permission denied" in message
