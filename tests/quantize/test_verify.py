"""`morph verify` and `morph inspect`, as a user meets them."""

import json
from collections.abc import Callable
from pathlib import Path

import forgery
import pytest
import torch
from typer.testing import CliRunner, Result

from morphserve.configs.errors import MorphError
from morphserve.morphcli.app import app
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import open_bundle, read_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.costs import AttentionTime, Curve, DeviceCosts, LayerTimes
from morphserve.quantize.manifest import LayerScores, RankedOrder, Ranking, TextSample, Variant


def morph(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A bundle with two variants that may be changed."""
    settings = QuantizeSettings("rtn", 32, int8=True)
    build_bundle(open_checkpoint(str(model)), tmp_path / "tiny.morph", settings)
    return tmp_path / "tiny.morph"


def test_a_whole_bundle_passes_and_names_the_next_command(model: Path, folder: Path) -> None:
    alone = morph("verify", folder)
    assert alone.exit_code == 0
    assert f"morph verify {folder} MODEL" in alone.output
    compared = morph("verify", folder, model)
    assert compared.exit_code == 0
    assert compared.output.count("ok") == 6
    assert f"try: morph serve {model} --bundle {folder}" in compared.output


def test_every_damaged_file_is_listed(folder: Path) -> None:
    missing = folder / "layer-00000.int8.safetensors"
    missing.unlink()
    changed = folder / "layer-00002.int4.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    result = morph("verify", folder)
    assert f"{missing} is missing" in result.output
    assert f"{changed} is damaged" in result.output
    assert isinstance(result.exception, MorphError) and result.exception.exit_code == 3
    assert f"2 of 6 layers of {folder} failed" in str(result.exception)
    assert f"morph quantize MODEL --output {folder} --force` and the options" in str(
        result.exception
    )
    assert "--floor" not in str(result.exception)
    assert "morph quantize" not in result.output  # said once, behind the list


def test_a_layer_that_computes_something_else_is_found_only_with_the_model(
    model: Path, folder: Path
) -> None:
    name = "self_attn.v_proj.scales"
    forgery.forge_tensors(folder, 1, lambda t: t.update({name: t[name] * 1.5}))
    assert morph("verify", folder).exit_code == 0
    result = morph("verify", folder, model, "--floor", "0.9", "--json")
    assert isinstance(result.exception, MorphError) and result.exception.exit_code == 3
    checks = json.loads(result.stdout)
    faults = [(check["layer"], check["variant"]) for check in checks if check["fault"]]
    assert faults == [(1, "int4")]
    found = next(check for check in checks if check["fault"])
    assert "scales keys or values by 5" in found["fault"]
    assert found["agreement"]["kv_shift"] == pytest.approx(0.5, abs=0.05)


def test_the_floor_decides(model: Path, folder: Path) -> None:
    assert morph("verify", folder, model, "--floor", "0.9").exit_code == 0
    result = morph("verify", folder, model, "--floor", "0.9999")
    assert "under 0.9999" in result.output
    assert "give a lower --floor" in str(result.exception)


def test_gptq_of_a_tiny_model_passes(model: Path, tmp_path: Path) -> None:
    """Its cosines on random tokens are far from those on the text it was fitted to."""
    (tmp_path / "text.txt").write_text("It was a dark and stormy night; the rain fell. " * 200)
    how = ("--calibration", tmp_path / "text.txt", "--group-size", "32", "--length", "32")
    made = morph("quantize", model, "-o", tmp_path / "gptq.morph", *how, "--samples", "8")
    assert made.exit_code == 0, made.output
    assert morph("verify", tmp_path / "gptq.morph", model).exit_code == 0
    strict = morph("verify", tmp_path / "gptq.morph", model, "--floor", "0.95")
    assert "under 0.95" in strict.output


def test_the_bundle_of_another_model_is_refused(
    folder: Path, tiny_model: Callable[[str], Path]
) -> None:
    result = morph("verify", folder, tiny_model("mistral"))
    assert "was built from another checkpoint" in str(result.exception)


def test_inspect_needs_no_model_and_no_files(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    result = morph("inspect", folder)
    assert result.exit_code == 0
    for part in (
        "llama, 3 layers",
        "int8",
        "rtn, symmetric",
        "0 1 2 (front to back",
        "morph verify",
    ):
        assert part in result.output, part


def test_inspect_shows_what_was_measured(model: Path, folder: Path) -> None:
    text = TextSample("novel.txt, first half", "00", 4, 16, 0)
    order = RankedOrder("lis", [2, 0, 1], [0.9, 0.8, 0.7], [0.1], [6.125], [0.5])
    curve = Curve([1, 16], [0.001, 0.0025])
    costs = DeviceCosts(
        "Abacus 3000", "reference", 1, "float32", 7, [LayerTimes("int4", 8, curve)], [], curve
    )
    bundle = open_bundle(str(folder), open_checkpoint(str(model)))
    scores = [LayerScores({Variant.INT4: 8}, {Variant.INT4: 0.1})] * 3
    bundle.with_ranking(Ranking(text, text, text, [2], scores, [order], "lis")).with_costs(costs)
    result = morph("inspect", folder)
    for part in ("2 0 1 (lis)", "0.9 0.8 0.7", "novel.txt", "6.125", "Abacus 3000", "2.500"):
        assert part in result.output, part
    manifest = json.loads(morph("inspect", folder, "--json").stdout)
    assert manifest["ranking"]["orders"][0]["layers"] == [2, 0, 1]
    assert manifest["costs"][0]["device"] == "Abacus 3000"


def test_names_of_orders_are_whole_on_a_narrow_terminal(folder: Path) -> None:
    text = TextSample("novel.txt", "00", 4, 16, 0)
    order = RankedOrder("front-to-back", [0, 1, 2], [], [0.01] * 6, [180.125] * 6, [0.5] * 6)
    scores = [LayerScores({Variant.INT4: 8}, {Variant.INT4: 0.1})] * 3
    ranking = Ranking(text, text, text, [0, 1, 2, 4, 8, 12], scores, [order], order.name)
    read_bundle(str(folder)).with_ranking(ranking)
    narrow = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "80"})
    table = narrow.output.partition("perplexity")[2]
    assert "front-to-back" in table


def test_times_of_the_same_set_up_replace_each_other(folder: Path) -> None:
    def costs(device: str, seconds: float) -> DeviceCosts:
        attention = [AttentionTime(1, 1, 16, seconds)]
        return DeviceCosts(device, "cpu", 1, "float32", 7, [], attention, Curve([1], [1.0]))

    bundle = read_bundle(str(folder))
    for device, seconds in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        bundle.with_costs(costs(device, seconds))
    found = read_bundle(str(folder)).manifest.costs
    assert [(c.device, c.attention[0].seconds) for c in found] == [("b", 2.0), ("a", 3.0)]


@pytest.mark.parametrize(
    ("costs", "reason"),
    [
        (DeviceCosts("x", "cpu", 1, "float32", 7, [], [], Curve([1, 2], [1.0])), "lack times"),
        (DeviceCosts("x", "cpu", 1, "float32", 7, [], [], Curve([1], [0.0])), "not positive"),
        (DeviceCosts("x", "cpu", 1, "float32", 7, [], [], Curve([2, 2], [1.0, 1.0])), "not rise"),
        (
            DeviceCosts(
                "x",
                "cpu",
                1,
                "float32",
                7,
                [LayerTimes("int3", 8, Curve([1], [1.0]))],
                [],
                Curve([1], [1.0]),
            ),
            "unknown variant",
        ),
        (
            DeviceCosts("x", "cpu", 1, "float32", 7, [], [], Curve([1], [float("nan")])),
            "Expected `float`, got `null`",
        ),
    ],
    ids=["lengths", "zero", "equal tokens", "variant", "nan"],
)
def test_times_that_make_no_sense_are_not_stored(
    folder: Path, costs: DeviceCosts, reason: str
) -> None:
    before = (folder / "bundle.json").read_bytes()
    with pytest.raises(MorphError, match=f"{reason}.* left as it is"):
        read_bundle(str(folder)).with_costs(costs)
    assert (folder / "bundle.json").read_bytes() == before


def test_what_is_read_without_a_model_is_what_is_read_with_it(model: Path, folder: Path) -> None:
    alone, compared = (
        read_bundle(str(folder)),
        open_bundle(str(folder), open_checkpoint(str(model))),
    )
    assert alone.architecture == open_checkpoint(str(model)).architecture
    assert torch.equal(alone.layer(1).qkv.codes, compared.layer(1).qkv.codes)
