"""A bundle is whole, untouched and made for the checkpoint, or it is refused with a way out."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from morphserve.configs.errors import ConfigError, MorphError
from morphserve.quantize.build import QuantizeSettings, build_bundle, default_group_size
from morphserve.quantize.bundle import BadBundle, Bundle, open_bundle
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.manifest import LayerScores, RankedOrder, Ranking, TextSample, Variant
from morphserve.quantize.rounding import Grid, quantize_rtn

RTN = QuantizeSettings("rtn", 32)

KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.checkpoint import open_checkpoint

def kill(layer):
    if layer == 1:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint, settings = open_checkpoint(sys.argv[1]), QuantizeSettings("rtn", 32)
build_bundle(checkpoint, Path(sys.argv[2]), settings, force=True, on_layer=kill)
"""


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(str(tiny_model("llama")))


@pytest.fixture
def folder(tiny_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama's bundle that may be changed."""
    return shutil.copytree(tiny_bundle("llama"), tmp_path / "bundle")


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-0000{layer}.int4.safetensors"


def refusal(folder: Path, checkpoint: Checkpoint) -> str:
    with pytest.raises(MorphError) as caught:
        open_bundle(str(folder), checkpoint)
    return str(caught.value)


def a_ranking(layers: list[int]) -> Ranking:
    text = TextSample("some.txt, first half", "00", 1, 16, 0)
    order = RankedOrder("lis", layers, [0.5, 0.25, 0.125], [0.1], [1.5], [0.1])
    scores = [LayerScores({Variant.INT4: 8}, {Variant.INT4: 0.1})] * 3
    return Ranking(text, text, text, [0], scores, [order], "lis")


def test_layers_come_back_as_they_were_rounded(
    family: str, tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(str(tiny_model(family)))
    bundle = open_bundle(str(tiny_bundle(family)), checkpoint)
    for i in range(3):
        full, int4 = checkpoint.layer(i), bundle.layer(i)
        for name in ("qkv", "o", "gate_up", "down"):
            expected = quantize_rtn(getattr(full, name), Grid(4, 32))
            assert torch.equal(getattr(int4, name).codes, expected.codes)
            assert torch.equal(getattr(int4, name).scales, expected.scales)
            bias, kept = getattr(full.biases, name), getattr(int4.biases, name)
            assert (bias is None and kept is None) or torch.equal(bias, kept)


def test_building_again_makes_the_same_files(checkpoint: Checkpoint, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    build_bundle(checkpoint, folder, RTN, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_bundle_is_not_replaced_unasked(checkpoint: Checkpoint, folder: Path) -> None:
    with pytest.raises(ConfigError, match="--force"):
        build_bundle(checkpoint, folder, RTN)


def test_a_wrong_group_size_leaves_the_old_bundle(checkpoint: Checkpoint, folder: Path) -> None:
    for group_size in (48, 0, 16):
        with pytest.raises(ConfigError, match=f"group size {group_size} must be a power of two"):
            build_bundle(checkpoint, folder, QuantizeSettings("rtn", group_size), force=True)
    open_bundle(str(folder), checkpoint)
    assert default_group_size(checkpoint.architecture) == 64


def test_weights_that_are_not_finite_are_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    import safetensors.torch

    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    path = model / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    path.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(MorphError, match="layer 2 .* not finite"):
        build_bundle(open_checkpoint(str(model)), tmp_path / "bundle", RTN)


def test_a_killed_build_leaves_the_old_bundle(checkpoint: Checkpoint, folder: Path) -> None:
    command = [sys.executable, "-c", KILLED_BUILD, str(checkpoint.path), str(folder)]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    open_bundle(str(folder), checkpoint)


def test_the_bundle_of_another_checkpoint_is_refused(
    tiny_model: Callable[[str], Path], folder: Path
) -> None:
    other = open_checkpoint(str(tiny_model("mistral")))
    message = refusal(folder, other)
    assert "another checkpoint" in message and f"run `morph quantize {other.path}`" in message


def test_folders_that_are_no_bundle_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert "there is no bundle" in refusal(tmp_path / "none", checkpoint)
    assert "not a finished bundle" in refusal(tmp_path, checkpoint)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 1}, "its schema is 1, this program reads 2"),
        ({"format": "other"}, "its format is 'other'"),
        ({"note": "hello"}, "unknown field `note`"),
        ({"variants": 3}, "Expected `object`"),
        ({"tool": "mine"}, "edited or damaged"),
    ],
)
def test_a_changed_manifest_is_refused(
    checkpoint: Checkpoint, folder: Path, change: dict[str, Any], reason: str
) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert reason in refusal(folder, checkpoint)


def test_the_order_is_front_to_back_until_a_ranking_is_stored(
    checkpoint: Checkpoint, folder: Path
) -> None:
    bundle = open_bundle(str(folder), checkpoint)
    assert bundle.order == [0, 1, 2]
    assert bundle.with_ranking(a_ranking([2, 0, 1])).order == [2, 0, 1]
    again = open_bundle(str(folder), checkpoint)
    assert again.order == [2, 0, 1]
    assert again.manifest.ranking == a_ranking([2, 0, 1])


def test_a_ranking_that_lacks_a_layer_is_refused(checkpoint: Checkpoint, folder: Path) -> None:
    bundle: Bundle = open_bundle(str(folder), checkpoint)
    with pytest.raises(BadBundle, match="does not hold every layer once.* left as it is"):
        bundle.with_ranking(a_ranking([2, 2, 1]))
    assert open_bundle(str(folder), checkpoint).manifest.ranking is None


def test_a_bundle_does_not_spill_among_other_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files than a bundle's"):
        build_bundle(checkpoint, tmp_path, RTN, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
