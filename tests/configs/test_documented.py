"""docs/configuration.md names every flag with its variable, its key and its default."""

import re
import tomllib
from pathlib import Path
from typing import Any

import typer.main
from typer.testing import CliRunner

from morphserve.morphcli.app import app
from morphserve.morphcli.settings import setting_params
from morphserve.runtime.server import run

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text("utf-8")


def serve() -> Any:
    return typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]


def documented() -> list[tuple[str, ...]]:
    """Section, flags, variable, key and default of each row."""
    rows, section = [], ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| `--"):
            rows.append((section, *(cell.strip() for cell in line.split("|")[1:5])))
    return rows


def default(option: Any) -> str:
    if option.default is None:
        return "–"
    if option.is_flag:
        return "on" if option.default else "off"
    return f"`{option.default:g}`" if type(option.default) is float else f"`{option.default}`"


def test_every_flag_stands_in_its_section_with_variable_key_and_default() -> None:
    command = serve()
    settings = setting_params(command)
    expected = [
        (
            option.rich_help_panel or "Beside these",
            ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts]),
            f"`{option.envvar}`",
            f"`{option.name.replace('_', '-')}`" if option in settings else "–",
            default(option),
        )
        for option in command.params
        if option.param_type_name == "option"
    ]
    assert documented() == expected


def test_the_file_that_it_shows_is_one(tmp_path: Path, monkeypatch: Any) -> None:
    shown = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert len(shown) == 1 and tomllib.loads(shown[0])
    (tmp_path / "serve.toml").write_text(shown[0])
    (tmp_path / "demo.morph").mkdir()
    monkeypatch.chdir(tmp_path)
    told: list[Any] = []
    monkeypatch.setattr(run, "run_server", lambda engine, server, _: told.append(engine) or 0)
    assert CliRunner().invoke(app, ["serve", "--config", "serve.toml"]).exit_code == 0
    assert told[0].scheduler.max_num_seqs == 32
