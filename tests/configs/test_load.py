"""Presets, policy files and sizes: what is read, and what a mistake is told."""

from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.configs.errors import ConfigError
from morphserve.configs.load import load_policy, parse_bytes, parse_slo, resolve_model
from morphserve.configs.schema import CacheConfig, SchedulerConfig, ServerConfig, Slo

ADAPTIVE = ("accuracy", "balanced", "performance")


def preset_text(name: str) -> str:
    return resources.files("morphserve.configs").joinpath(f"{name}.toml").read_text("utf-8")


def write(folder: Path, text: str) -> str:
    file = folder / "mine.toml"
    file.write_text(text, "utf-8")
    return str(file)


@pytest.mark.parametrize("name", [*ADAPTIVE, "off"])
def test_a_preset_loads_under_its_own_name(name: str) -> None:
    assert load_policy(name).name == name


def test_presets_go_deeper_and_react_sooner_from_accuracy_to_performance() -> None:
    accuracy, balanced, performance = map(load_policy, ADAPTIVE)
    for left, right in ((accuracy, balanced), (balanced, performance)):
        assert left.max_demoted(12) < right.max_demoted(12)
        assert left.entry_windows > right.entry_windows
        assert left.demote_above > right.demote_above
        assert left.max_queue_delay_s > right.max_queue_delay_s


def test_adaptive_presets_leave_the_depth_to_the_controller() -> None:
    assert [load_policy(name).static_layers for name in ADAPTIVE] == [-1, -1, -1]
    assert load_policy("performance").max_demoted(12) == 12


def test_off_never_demotes() -> None:
    assert load_policy("off").max_demoted(12) == 0


@pytest.mark.parametrize(("name", "layers"), [("static:0", 0), ("static:5", 5), ("static:99", 12)])
def test_static_holds_so_many_layers_and_never_more_than_there_are(name: str, layers: int) -> None:
    policy = load_policy(name)
    assert policy.name == name
    assert policy.max_demoted(12) == layers


def test_static_all_is_every_layer_of_any_model() -> None:
    assert [load_policy("static:all").max_demoted(layers) for layers in (12, 126)] == [12, 126]


@pytest.mark.parametrize("name", ["static:", "static:-1", "static:half", "static:1.5"])
def test_static_wants_a_number(name: str) -> None:
    with pytest.raises(ConfigError, match="write static:N with N layers, or static:all"):
        load_policy(name)


@pytest.mark.parametrize("name", ["balance", "static", "", "presets/off"])
def test_an_unknown_policy_is_told_the_choices(name: str) -> None:
    with pytest.raises(ConfigError, match=r"choose one of accuracy, balanced, performance, off"):
        load_policy(name)


def test_a_policy_file_has_the_presets_keys(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, preset_text("balanced")))
    assert policy == load_policy("balanced")


def test_a_whole_number_is_a_number_of_seconds_too(tmp_path: Path) -> None:
    text = preset_text("balanced").replace("dwell_s = 2.0", "dwell_s = 3")
    dwell = load_policy(write(tmp_path, text)).dwell_s
    assert (dwell, type(dwell)) == (3.0, float)


def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path) -> None:
    text = preset_text("balanced") + "\ndemote_abov = 0.5\n"
    with pytest.raises(ConfigError, match="unknown key 'demote_abov'.*did you mean 'demote_above'"):
        load_policy(write(tmp_path, text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("entry_windows = 3", "entry_windows = 3.5", "'entry_windows' must be int, not 3.5"),
        ("entry_windows = 3", "entry_windows = true", "'entry_windows' must be int, not True"),
        ("dwell_s = 2.0", 'dwell_s = "2s"', "'dwell_s' must be float, not '2s'"),
        ("dwell_s = 2.0", "dwell_s = true", "'dwell_s' must be float, not True"),
        ("dwell_s = 2.0", "", "lacks dwell_s"),
        ("dwell_s = 2.0", "dwell_s = ", "not valid TOML"),
        ("promote_below = 0.8", "promote_below = 0.9", "must lie under demote_above"),
        ("max_demoted_share = 0.5", "max_demoted_share = 1.5", "must lie between 0 and 1"),
    ],
)
def test_a_wrong_policy_file_says_what_is_wrong(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = preset_text("balanced")
    assert old in text
    with pytest.raises(ConfigError, match=message):
        load_policy(write(tmp_path, text.replace(old, new)))


def test_a_missing_policy_file_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot read policy file nowhere.toml"):
        load_policy("nowhere.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000000", 1_000_000),
        ("96MiB", 96 * 2**20),
        ("96 mib", 96 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("2G", 2_000_000_000),
        ("2Gi", 2 * 2**30),
        (" 64k ", 64_000),
        ("512B", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["ttft=0s", "", "MiB", "-1", "1e6", "12 TB", "1,5G", "1.G", "96 Mi B", "nan"]
)
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size: write for example 96MiB or 2GB"):
        parse_bytes(text)


@given(st.integers(0, 2**20), st.sampled_from([("KiB", 2**10), ("MB", 10**6), ("Gi", 2**30)]))
def test_whole_sizes_are_exact(count: int, unit: tuple[str, int]) -> None:
    name, factor = unit
    assert parse_bytes(f"{count}{name}") == count * factor


def test_demo_is_the_shipped_model_and_any_other_name_a_folder() -> None:
    assert (resolve_model("demo") / "model.safetensors").is_file()
    assert resolve_model("models/llama") == Path("models/llama")


def test_settings_are_checked_where_they_are_made() -> None:
    with pytest.raises(ConfigError, match="--max-num-seqs must be at least 1, not 0"):
        SchedulerConfig(max_num_seqs=0)
    with pytest.raises(ConfigError, match=r"--max-num-batched-tokens \(8\) must be at least"):
        SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=8)


def test_presets_hold_every_number_of_a_policy() -> None:
    for name in ("accuracy", "balanced", "performance", "off", "static"):
        for key in asdict(load_policy("balanced")):
            assert f"\n{key} = " in preset_text(name), f"{name} lacks {key}"


def test_targets_are_read_with_units() -> None:
    assert parse_slo("ttft=2s,tpot=200ms") == Slo(2.0, 0.2)
    assert parse_slo("tpot = 1.5s") == Slo(None, 1.5)


@pytest.mark.parametrize("text", ["", "ttft=2", "e2e=2s", "ttft<2s", "ttft=-1s", "ttft=0s"])
def test_targets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="ttft=2s,tpot=200ms"):
        parse_slo(text)


def test_keys_are_in_no_representation() -> None:
    server = ServerConfig("demo", api_keys=("sk-secret",), admin_key="root-secret")
    assert "secret" not in repr(server)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"api_keys": ("",)}, "1 to 4096 visible ASCII characters"),
        ({"admin_key": ""}, "1 to 4096 visible ASCII characters"),
        ({"log_format": "xml"}, "text or json, not 'xml'"),
        ({"overload_status": 500}, "503 or 429, not 500"),
    ],
)
def test_what_a_server_cannot_be_told_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig("demo", **wrong)


def test_waits_and_blocks_are_positive() -> None:
    with pytest.raises(ConfigError, match="--queue-timeout must be above 0 seconds, not nan"):
        SchedulerConfig(queue_timeout_s=float("nan"))
    with pytest.raises(ConfigError, match="--block-size must be at least 1, not 0"):
        CacheConfig(block_tokens=0)
