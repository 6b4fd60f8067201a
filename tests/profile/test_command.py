"""`morph quantize`, then `morph profile`, as a user runs them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from morphserve.configs.errors import MorphError
from morphserve.morphcli.app import app
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.checkpoint import open_checkpoint


def morph(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen2")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(32, 127))) * 20)
    return path


def test_from_checkpoint_to_ranked_bundle(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a bundle"
    made = morph("quantize", model, "--output", folder, "--group-size", "32")
    assert made.exit_code == 0, made.output
    assert "relative weight error" in made.output
    assert f"try: morph profile {model} --bundle '{folder}'" in made.output
    ranked = morph(
        *("profile", model, "--bundle", folder, "--calibration", text),
        *("--samples", "2", "--length", "32"),
    )
    assert ranked.exit_code == 0, ranked.output
    for name in ("lis", "front-to-back", "back-to-front", "random"):
        assert name in ranked.output
    assert f"try: morph serve {model} --bundle '{folder}'" in ranked.output
    bundle = open_bundle(str(folder), open_checkpoint(str(model)))
    assert bundle.manifest.ranking is not None
    assert " ".join(map(str, bundle.order)) in ranked.output


def test_json_holds_the_same_for_scripts(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    made = json.loads(morph("quantize", model, "-o", folder, "--json").stdout)
    assert made["bundle"] == str(folder)
    assert made["group_size"] == 64
    assert [layer["layer"] for layer in made["layers"]] == [0, 1, 2]
    assert all(layer["int4_bytes"] < layer["full_bytes"] / 4 for layer in made["layers"])
    options = ("--calibration", text, "--samples", "1", "--length", "32", "--json")
    ranked = json.loads(morph("profile", model, "-b", folder, *options).stdout)
    chosen = next(order for order in ranked["orders"] if order["name"] == ranked["chosen"])
    bundle = open_bundle(str(folder), open_checkpoint(str(model)))
    assert bundle.order == chosen["layers"]


def test_a_profile_without_text_says_how_to_give_some(model: Path, tmp_path: Path) -> None:
    morph("quantize", model, "-o", tmp_path / "bundle")
    failed = morph("profile", model, "-b", tmp_path / "bundle")
    assert isinstance(failed.exception, MorphError)
    assert "--calibration" in str(failed.exception)
