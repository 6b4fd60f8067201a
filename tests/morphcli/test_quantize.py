"""`morph quantize` refuses what it would ignore, and a dry run what a build would refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from plain_model import write_plain_model
from typer.testing import CliRunner, Result

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.app import app

GPTQ = Path(__file__).parents[1] / "quantize" / "formats" / "data" / "gptq-v1-order"


def morph(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, words)])


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--group-size", "48"], "must be a power of two"),
        (["--device", "sofa"], "choose cpu, cuda or cuda:N"),
        (["--output", "there"], "holds a bundle already: pass --force"),
        (["--output", "foreign"], "holds other files than a bundle's"),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_dry_run_refuses_what_a_build_refuses(
    dry_run: list[str],
    options: list[str],
    reason: str,
    model: Path,
    tiny_bundle: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bundle("llama"), "there")
    Path("foreign").mkdir()
    Path("foreign", "thesis.txt").touch()
    refused = morph(model, "--method", "rtn", *options, *dry_run)
    assert isinstance(refused.exception, ConfigError)
    assert reason in str(refused.exception)


def test_a_dry_run_says_where_the_bundle_would_be_and_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(model, tmp_path / "a-model")
    monkeypatch.chdir(copy)
    before = sorted(copy.iterdir())
    found = json.loads(morph(".", "--method", "rtn", "--dry-run", "--json").stdout)
    assert found["bundle"] == "a-model.morph"
    assert "bundle  a-model.morph" in morph(".", "--method", "rtn", "--dry-run").stdout
    assert sorted(copy.iterdir()) == before


@pytest.mark.parametrize(
    "option",
    [
        ["--method", "rtn"],
        ["--group-size", "32"],
        ["--sym"],
        ["--asym"],
        ["--act-order"],
        ["--no-act-order"],
    ],
)
def test_layers_of_another_tool_are_not_rounded_again(option: list[str], tmp_path: Path) -> None:
    write_plain_model(tmp_path / "model", 2)
    refused = morph(tmp_path / "model", "-o", tmp_path / "b", "--from", GPTQ, *option)
    assert isinstance(refused.exception, ConfigError)
    assert "cannot be chosen with --from" in str(refused.exception)
    made = morph(tmp_path / "model", "-o", tmp_path / "b", "--from", GPTQ)
    assert made.exit_code == 0, made.output
    assert "from gptq-v1-order (gptq)" in made.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "needs_text"),
    [([], True), (["--calibration", "few.txt"], False)],
)
def test_a_method_without_text_is_offered_only_where_none_was_given(
    options: list[str],
    needs_text: bool,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("little")
    refused = morph(model, *options)
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception).endswith("--method rtn needs no text") == needs_text


def test_windows_longer_than_the_model_are_refused_not_cut(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text " * 1000)
    refused = morph(model, "--calibration", text, "--length", "257", "--samples", "1")
    assert isinstance(refused.exception, ConfigError)
    assert "2 to 256 tokens" in str(refused.exception)
