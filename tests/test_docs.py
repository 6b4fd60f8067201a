"""The documents say what is true: files, links, presets and options that they name exist."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from morphserve.morphcli.app import app
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.server import State
from morphserve.morphcli.traces.formats import FORMATS

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "morphcli", "profile", "quantize", "runtime")
PRESETS = ("accuracy", "balanced", "performance", "off")
PAGES = (
    *("README.md", "ARCHITECTURE.md", "BENCHMARKS.md", "CONTRIBUTING.md"),
    *("docs/bundle-format.md", "docs/configuration.md", "docs/controller.md", "docs/formats.md"),
    *(
        "docs/bench.md",
        "docs/gpu.md",
        "docs/limits.md",
        "docs/quality.md",
        "docs/simulator.md",
        "docs/traces.md",
    ),
)


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def described_files() -> Iterator[Path]:
    """The files in the first column of ARCHITECTURE's tables, each below its folder's heading."""
    folder = None
    for line in read("ARCHITECTURE.md").splitlines():
        if heading := re.match(r"### (\S+/)", line):
            folder = ROOT / heading[1]
        elif folder and line.startswith("| `"):
            yield from (folder / name for name in re.findall(r"`([^`]+)`", line.split("|")[1]))


def commands(page: str) -> list[list[str]]:
    """The `morph` lines in a page's shell blocks, each as a list of words."""
    blocks = re.findall(r"```sh\n(.*?)```", read(page), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("morph ")]


def test_architecture_describes_every_source_file() -> None:
    described = set(described_files())
    sources = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.[pch]*")}
    code = {path for path in sources if path.suffix in {".py", ".c", ".h"}}
    package_faces = {path for path in code if path.name == "__init__.py"}
    assert code - package_faces - described == set()


def test_architecture_describes_no_file_that_is_gone() -> None:
    assert [path for path in described_files() if not path.exists()] == []


@pytest.mark.parametrize("page", [*PAGES, "morphcli/demo_model/README.md"])
def test_links_to_files_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", read(page)):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_readme_shows_the_presets_as_they_are() -> None:
    presets = [tomllib.loads(read(f"configs/{name}.toml")) for name in PRESETS]
    rows = re.findall(r"^\|.*\(`(\w+)`\) \|(.*)\|$", read("README.md"), re.MULTILINE)
    shown = {key: [float(cell) for cell in cells.split("|")] for key, cells in rows}
    assert shown.keys() == presets[0].keys() - {"name", "static_layers"}
    for key, values in shown.items():
        assert values == [preset[key] for preset in presets], key


def test_readme_shows_the_way_from_a_checkpoint_to_a_comparison() -> None:
    shown = {line[1] for line in commands("README.md")}
    assert shown >= {"quantize", "profile", "serve", "bench"}


@pytest.mark.parametrize("page", ["README.md", "docs/bench.md", "docs/gpu.md", "docs/traces.md"])
def test_commands_and_options_that_are_shown_exist(page: str) -> None:
    assert commands(page)
    for line in commands(page):
        command: Any = typer.main.get_command(app)
        for word in line[1:]:
            command = getattr(command, "commands", {}).get(word, command)
        options = {option for param in command.params for option in param.opts}
        used = {word for word in line if word.startswith("-")}
        assert used <= options, line


def test_the_page_of_traces_has_every_format_with_its_columns() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \|", read("docs/traces.md"), re.M
    )
    assert rows == [
        (known.name, known.columns.time, known.columns.prompt, known.columns.output)
        for known in FORMATS
    ]


def test_the_controllers_page_has_every_key_of_balanced() -> None:
    preset = tomllib.loads(read("configs/balanced.toml"))
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\S+) \|$", read("docs/controller.md"), re.MULTILINE)
    assert {key: float(value) for key, value in rows} == {
        key: value for key, value in preset.items() if key != "name"
    }


def test_every_field_of_a_run_folder_is_described() -> None:
    page = set(re.findall(r"`([a-z_0-9]+)`", read("docs/bench.md")))
    assert set(PolicySummary.__struct_fields__) - page == set()
    assert set(Outcome.__struct_fields__) - page == set()
    assert set(State.__struct_fields__) - page == set()
    assert set(Summary.__struct_fields__) - page <= {"created", "notes"}
