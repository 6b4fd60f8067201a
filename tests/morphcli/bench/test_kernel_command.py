"""`morph bench --kernels` on the command line: what it does not take."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.app import app


def refused(*words: str) -> str:
    error = CliRunner().invoke(app, ["bench", *words]).exception
    assert isinstance(error, ConfigError)
    return str(error)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["demo"], "leave out MODEL"),
        (["--trace", "trace.csv"], "leave out --trace"),
        (["--output", "run"], "leave out --output"),
        (["--url", "http://x"], "leave out --url"),
        (["--assert", "morph.slo_attainment>=1"], "leave out --assert"),
    ],
)
def test_what_is_about_a_replay_is_refused(words: list[str], named: str) -> None:
    assert named in refused("--kernels", *words)


@pytest.mark.parametrize("value", ["auto", "reference"])
def test_a_value_as_servers_take_it_is_refused_as_such(value: str) -> None:
    said = refused("--kernels", value)
    assert said.startswith(f"--kernels takes a value in `morph serve` only: leave out {value}")


def test_threads_are_for_kernels(tmp_path: Path) -> None:
    said = refused("demo", "--trace", str(tmp_path), "--threads", "1")
    assert "--threads is for --kernels" in said


@pytest.mark.parametrize("words", [[], ["demo"], ["--trace", "t.csv"]])
def test_a_replay_needs_a_model_and_a_trace(words: list[str]) -> None:
    assert "name a model and a trace" in refused(*words)
