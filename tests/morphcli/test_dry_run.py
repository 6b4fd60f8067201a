"""`morph serve --dry-run`: the memory plan is the one that the server would have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plain_model import write_plain_model
from typer.testing import CliRunner, Result

from morphserve.configs.errors import OutOfBudget
from morphserve.configs.load import load_policy, resolve_model
from morphserve.configs.schema import CacheConfig, EngineConfig
from morphserve.morphcli.app import app
from morphserve.morphcli.dry_run import _sentences, make_plan
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import BadBundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.formats.source import open_quantized
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import build, foretell
from morphserve.runtime.loader import load_model
from morphserve.runtime.sizing import outline_model

FORMATS = Path(__file__).parents[1] / "quantize" / "formats" / "data"


def dry_run(*words: str | Path) -> Result:
    arguments = ["serve", *map(str, words), "--dry-run"]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def plan(*words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dry_run(*words, "--json").stdout)
    return found


def test_sizes_are_those_of_the_loaded_demo_model(demo_bundle: Path) -> None:
    config = EngineConfig(str(resolve_model("demo")), load_policy("balanced"), str(demo_bundle))
    assert outline_model(config).sizes(16) == load_model(config).sizes(16)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_sizes_are_those_of_the_loaded_model_in_every_family(
    family: str,
    tiny_model: Callable[[str], Path],
    tiny_bundle: Callable[[str], Path],
    kernels: str,
    dtype: str,
) -> None:
    policy, bundle = load_policy("performance"), str(tiny_bundle(family))
    config = EngineConfig(str(tiny_model(family)), policy, bundle, kernels=kernels, dtype=dtype)
    assert outline_model(config).sizes(8) == load_model(config).sizes(8)


def test_sizes_are_those_of_a_bundle_with_int8_too(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    model, bundle = tiny_model("llama"), tmp_path / "b.morph"
    build_bundle(open_checkpoint(str(model)), bundle, QuantizeSettings("rtn", 32, int8=True))
    config = EngineConfig(str(model), load_policy("performance"), str(bundle))
    sizes = outline_model(config).sizes(8)
    assert sizes == load_model(config).sizes(8)
    assert set(sizes.image_bytes) == set(Variant)


def test_sizes_are_those_of_a_bundle_with_zeros_of_its_own(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    model, bundle = tiny_model("llama"), tmp_path / "b.morph"
    build_bundle(open_checkpoint(str(model)), bundle, QuantizeSettings("rtn", 32, symmetric=False))
    config = EngineConfig(str(model), load_policy("performance"), str(bundle))
    assert outline_model(config).sizes(8) == load_model(config).sizes(8)


@pytest.mark.parametrize("name", ["gptq-v1-order", "awq-gqa", "compressed-channel"])
def test_sizes_are_those_of_a_bundle_that_another_tool_made(tmp_path: Path, name: str) -> None:
    model, bundle = tmp_path / "model", tmp_path / "b.morph"
    write_plain_model(model, 2)
    checkpoint = open_checkpoint(str(model))
    imported = open_quantized(str(FORMATS / name), checkpoint)
    build_bundle(checkpoint, bundle, QuantizeSettings(), imported=imported)
    config = EngineConfig(str(model), load_policy("performance"), str(bundle))
    assert outline_model(config).sizes(8) == load_model(config).sizes(8)


def test_the_plan_is_what_the_engine_says_of_itself(demo_bundle: Path) -> None:
    cache = CacheConfig(memory_budget=60 * 2**20)
    policy = load_policy("balanced")
    config = EngineConfig(str(resolve_model("demo")), policy, str(demo_bundle), cache=cache)
    hello = build(config, load_model(config)).hello
    found = plan("demo", "--bundle", demo_bundle, "--memory-budget", "60MiB")
    assert found["memory"]["budget"] == hello.memory.budget
    assert found["memory"]["static"] == hello.memory.static
    assert found["memory"]["layers"] == hello.memory.layers
    rungs = found["rungs"]
    assert [room["rung"] for room in rungs] == [0, 1, len(hello.capacities) - 1]
    assert [room["blocks"] for room in rungs] == [hello.capacities[r] for r in (0, 1, -1)]
    assert rungs[0]["layers"] == {"full": 12} and rungs[1]["layers"]["full"] == 11
    for room in rungs:
        assert room["requests"]["2048"] == room["tokens"] // 2048
        assert room["requests"]["512"] == room["tokens"] // 512


def test_a_policy_that_never_swaps_has_one_rung_and_no_copies() -> None:
    found = plan("demo", "--policy", "off", "--memory-budget", "60MiB")
    assert [room["rung"] for room in found["rungs"]] == [0]
    assert found["memory"]["staging"] == found["host_bytes"] == 0


def test_a_person_reads_rungs_and_that_it_fits(demo_bundle: Path) -> None:
    result = dry_run("demo", "--bundle", demo_bundle, "--memory-budget", "60MiB")
    assert result.exit_code == 0
    assert "12 full" in result.stdout and "it fits" in result.stdout
    assert "60.0 MiB" in result.stdout


def test_a_budget_that_is_too_small_is_refused_with_the_number_that_does() -> None:
    with pytest.raises(OutOfBudget, match="raise --memory-budget to 33MiB") as raised:
        dry_run("demo", "--policy", "off", "--memory-budget", "20MiB")
    assert raised.value.exit_code == 5
    assert dry_run("demo", "--policy", "off", "--memory-budget", "33MiB").exit_code == 0


def test_a_program_is_told_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", "demo", "--policy", "off", "--dry-run", "--json", "--memory-budget"]
    with pytest.raises(OutOfBudget) as raised:
        app([*words, "20MiB"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False and told["reason"] == str(raised.value)
    app([*words, str(told["needed_bytes"])], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["fits"] is True
    with pytest.raises(OutOfBudget):
        app([*words, str(told["needed_bytes"] - 1)], standalone_mode=False)


def test_weights_are_not_read(
    tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from morphserve.quantize import checkpoint

    def refuse(_: object) -> None:
        raise AssertionError("read a tensor")

    monkeypatch.setattr(checkpoint, "read_tensor", refuse)
    assert plan(tiny_model("llama"), "--policy", "off")["rungs"][0]["blocks"] > 0


def test_a_bundle_of_another_architecture_is_refused(
    tiny_model: Callable[[str], Path], tiny_bundle: Callable[[str], Path]
) -> None:
    with pytest.raises(BadBundle, match="was built from another checkpoint"):
        dry_run(tiny_model("qwen3"), "--bundle", tiny_bundle("llama"))


def test_a_plan_for_a_device_of_its_own_says_what_it_cannot_know(demo_bundle: Path) -> None:
    policy = load_policy("balanced")
    config = EngineConfig("demo", policy, str(demo_bundle), device="cpu")
    made = make_plan(foretell(config, outline_model(config)), [], on_host=False)
    shown = " ".join(_sentences(made))
    assert "is not known before the start, when it is measured" in shown
    assert "warning" not in shown, "the budget is no main memory"
