"""docs/limits.md gives the limits that the code has."""

import dataclasses
import re
from importlib import import_module
from pathlib import Path

import pytest
import typer.main

from morphserve.configs import schema
from morphserve.morphcli.app import app
from morphserve.runtime import deliveries
from morphserve.runtime.server import (
    admission,
    body,
    connections,
    keys,
    middleware,
    protocol,
    sampling,
)

PAGE = Path(__file__).parents[3].joinpath("docs", "limits.md").read_text("utf-8")
ROWS = re.findall(r"^\| (.+) \| (.+) \| (.+) \| `(\w+)\.(\w+)` \|$", PAGE, re.MULTILINE)
UNITS = {"": 1, " s": 1, " KiB": 1024, " MiB": 1024**2}


def value_in_code(place: str, name: str) -> object:
    if place.endswith("Config"):
        fields = {field.name: field for field in dataclasses.fields(getattr(schema, place))}
        return fields[name].default
    beside = place in ("engine_client", "deliveries")
    package = "morphserve.runtime" if beside else "morphserve.runtime.server"
    return getattr(import_module(f"{package}.{place}"), name)


@pytest.mark.parametrize(("limit", "value", "seen", "place", "name"), ROWS)
def test_a_documented_limit_is_the_codes(
    limit: str, value: str, seen: str, place: str, name: str
) -> None:
    if value in ("none", "the model's"):
        assert value_in_code(place, name) is None
    else:
        number, unit = re.fullmatch(r"([\d.]+)(.*)", value, re.ASCII).groups()  # type: ignore[union-attr]
        assert float(number) * UNITS[unit] == value_in_code(place, name)


def test_every_limit_of_the_server_is_documented() -> None:
    constants = {
        name
        for module in (
            admission,
            body,
            connections,
            deliveries,
            keys,
            middleware,
            protocol,
            sampling,
        )
        for name in vars(module)
        if re.match(r"MAX_|DEFAULT_|KEEP_ALIVE_S|\w+_TIMEOUT_S|ADMIN_CALLS|QUEUED_", name)
    }
    assert constants <= {name for *_, name in ROWS}


def test_flags_in_the_page_are_those_of_the_command() -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= options
