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
from morphserve.runtime.costs import cost_model


def morph(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen2")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(1000))))
    return path


def test_from_checkpoint_to_ranked_bundle(model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a bundle"
    made = morph("quantize", model, "--output", folder, "--group-size", "32", "--method", "rtn")
    assert made.exit_code == 0, made.output
    assert f"try: morph profile {model} --bundle '{folder}'" in made.output
    ranked = morph(
        *("profile", model, "--bundle", folder, "--calibration", text),
        *("--samples", "2", "--length", "32", "--independence", "--positions"),
    )
    assert ranked.exit_code == 0, ranked.output
    for name in ("lis", "kl-per-byte", "front-to-back", "back-to-front", "random-0", "random-4"):
        assert name in ranked.output
    for study in ("layers together and alone", "odd eighths"):
        assert study in ranked.output
    assert f"wrote {folder}/profile.html" in ranked.output
    assert f"try: morph serve {model} --bundle '{folder}'" in ranked.output
    bundle = open_bundle(str(folder), open_checkpoint(str(model)))
    assert bundle.manifest.ranking is not None
    (costs,) = bundle.manifest.costs
    assert f"ms, on {costs.device}" in ranked.output.replace("\n", " ")
    model_of_costs = cost_model(costs)
    errors = (model_of_costs.decode.error, model_of_costs.prefill.error)
    assert "decode attention {:.0%}, prefill {:.0%}".format(*errors) in ranked.output
    assert f"order is now: {' '.join(map(str, bundle.order))}" in ranked.output
    again = morph("quantize", model, "-o", folder, "--force", "--method", "rtn")
    assert again.exit_code == 0, again.output  # a report is no foreign file


def test_quantize_tells_scripts_the_same_as_people(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    made = json.loads(morph("quantize", model, "-o", folder, "--method", "rtn", "--json").stdout)
    assert made["bundle"] == str(folder)
    assert made["group_size"] == 64
    assert [layer["layer"] for layer in made["layers"]] == [0, 1, 2]
    assert all(layer["int4_bytes"] < layer["full_bytes"] / 4 for layer in made["layers"])


def test_json_is_what_the_bundle_and_the_report_hold(
    model: Path, text: Path, own_bundle: Path, tmp_path: Path
) -> None:
    folder = own_bundle
    printed = morph(
        *("profile", model, "-b", folder, "--calibration", text, "--json"),
        *("--samples", "1", "--length", "32", "--orders", "lis, random", "--seeds", "2"),
        *("--lis-weights", "0,0,1", "--distance", "l2", "--report", tmp_path / "report"),
    )
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.stdout)
    assert found == json.loads((tmp_path / "report" / "profile.json").read_text())
    ranking = found["ranking"]
    assert ranking["lis"] == {"weights": [0.0, 0.0, 1.0], "distance": "l2"}
    assert [order["name"] for order in ranking["orders"]] == ["lis", "random-0", "random-1"]
    chosen = next(order for order in ranking["orders"] if order["name"] == ranking["chosen"])
    bundle = open_bundle(str(folder), open_checkpoint(str(model)))
    assert bundle.order == chosen["layers"]
    assert not list(folder.glob("profile.*"))
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        f"profile.{kind}" for kind in ("html", "json", "png", "svg")
    }


@pytest.fixture
def own_bundle(tiny_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in tiny_bundle("qwen2").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_report_without_a_place_is_refused_before_measuring(
    model: Path, text: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("morphserve.profile.result.make_profile")
    failed = morph(
        *("profile", model, "-b", own_bundle, "--calibration", text, "--samples", "1"),
        *("--length", "32", "--report", text),
    )
    assert isinstance(failed.exception, MorphError)
    assert f"cannot write to {text}" in str(failed.exception)


def test_a_bundle_keeps_its_order_if_the_report_cannot_be_written(
    model: Path, text: Path, own_bundle: Path, tmp_path: Path
) -> None:
    before = (own_bundle / "bundle.json").read_bytes()
    (tmp_path / "report" / "profile.html" / "x").mkdir(parents=True)
    failed = morph(
        *("profile", model, "-b", own_bundle, "--calibration", text, "--orders", "kl-per-byte,"),
        *("--samples", "1", "--length", "32", "--seeds", "0", "--report", tmp_path / "report"),
    )
    assert isinstance(failed.exception, MorphError)
    assert "profile.html" in str(failed.exception)
    assert (own_bundle / "bundle.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--device", "sofa"], "there is no device 'sofa'"),
        (["--lis-weights", "1,2"], "must be three numbers"),
        (["--lis-weights", "1,nan,1"], "of at least 0, not all 0"),
        (["--lis-weights", "nan,1,1"], "of at least 0, not all 0"),
        (["--lis-weights", "1,inf,1"], "of at least 0, not all 0"),
        (["--lis-weights", "1,1,-1"], "of at least 0, not all 0"),
        (["--lis-weights", "0,0,0"], "of at least 0, not all 0"),
        (["--orders", ","], "no order to compare"),
        (["--distance", "l3"], "one of cosine, l2"),
        (["--orders", "best"], "choose from lis"),
        (["--seeds", "0"], "leave `random` out"),
        (["--length", "8", "--positions"], "raise --length"),
        ([], "--calibration"),
    ],
)
def test_what_cannot_be_done_is_told_with_a_way_out(
    model: Path,
    text: Path,
    tiny_bundle: Callable[[str], Path],
    options: list[str],
    complaint: str,
) -> None:
    source = ["--calibration", text] if options else []
    failed = morph("profile", model, "-b", tiny_bundle("qwen2"), *source, *options)
    assert isinstance(failed.exception, MorphError)
    assert complaint in str(failed.exception)
