"""Where a command's settings come from: flag, `MORPH_*` environment, `--config` file, default."""

import difflib
import inspect
import re
import tomllib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from morphserve.configs.errors import ConfigError

_PREFIX = "MORPH_"
_NOT_SETTINGS = ("config", "dry_run", "json", "help")
_SECRETS = ("api_key", "admin_key")
_KINDS: dict[Any, tuple[type, ...]] = {  # what TOML may hold for an option of this type
    str: (str,),
    Path: (str,),
    int: (int,),
    float: (int, float),
    bool: (bool,),
}


def variable(name: str) -> str:
    """The environment variable of an option: MORPH_PORT of `port`."""
    return f"{_PREFIX}{name.upper()}"


def misspelt(given: Iterable[str], commands: Iterable[Any]) -> dict[str, str]:
    """The variables of `given` that no command knows, and which each was meant to be.

    Those that resemble no setting are left out: another program may share the prefix.
    """
    known = {param.envvar for command in commands for param in command.params if param.envvar}
    bare = [name.removeprefix(_PREFIX) for name in known]  # alike by more than what all share
    found = {}
    for name in sorted(name for name in given if name.startswith(_PREFIX) and name not in known):
        if near := difflib.get_close_matches(name.removeprefix(_PREFIX), bare, n=1):
            found[name] = _PREFIX + near[0]
    return found


def first_key(text: str | None) -> str | None:
    """The key to ask a server with: MORPH_API_KEY may hold all that the server takes.

    Raises ConfigError for what no header can carry.
    """
    key = next(iter((text or "").split()), None)
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise ConfigError("--api-key must be visible ASCII characters, no spaces")
    return key


class Command(TyperCommand):
    """A command whose options can come from the environment.

    Its help shows options under the headings of their panels, in plain text: rich's own panels
    take three times as long as all the rest of `--help`.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for param in self.params:
            if param.param_type_name == "option":
                param.envvar = variable(param.name)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            param.show_envvar = False  # type: ignore[attr-defined]  # one rule, not 30 names
            record = param.get_help_record(ctx)
            if record is not None:
                is_argument = param.param_type_name == "argument"
                panel = getattr(param, "rich_help_panel", None)
                title = panel or ("Arguments" if is_argument else "Options")
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of an eager `--config`: the file's values stand in for the options' defaults.

    Raises ConfigError, naming file and key, for anything that no option of the command takes.
    """
    if path is None or ctx.resilient_parsing:
        return path
    assert ctx.command.callback is not None
    hints = get_type_hints(inspect.unwrap(ctx.command.callback))
    known = {param.name: param for param in setting_params(ctx.command)}
    values = {}
    for key, value in _read_toml(path).items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            raise ConfigError(f"{path}: {key!r} is a table: write the flags' names at top level")
        if name not in known:
            raise ConfigError(f"{path}: {_unknown(key, list(known))}")
        if name in values:
            raise ConfigError(f"{path}: {key!r} is there twice, with dashes and underscores")
        _check_kind(path, key, value, hints[name])
        try:
            known[name].process_value(ctx, value)
        except typer.BadParameter as error:
            raise ConfigError(f"{path}: {key!r}: {error.message}") from None
        values[name] = value
    ctx.default_map = values
    return path


def setting_params(command: Any) -> list[Any]:
    """The parameters of a command that a file may set: all but those that say what to do."""
    return [param for param in command.params if param.name not in _NOT_SETTINGS]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.0)[0]
    return f"unknown key {key!r}: did you mean {near.replace('_', '-')!r}?"


def _check_kind(path: Path, key: str, value: object, hint: Any) -> None:
    kind = _without_none(hint)
    is_list = get_origin(kind) is list
    element = _without_none(get_args(kind)[0]) if is_list else kind
    allowed = _KINDS.get(element, (str,))
    if is_list and not isinstance(value, list):
        raise ConfigError(f"{path}: {key!r} must be a list, not {type(value).__name__}")
    for entry in value if isinstance(value, list) and is_list else [value]:
        if type(entry) not in allowed:  # the entry itself may be a secret: its type is enough
            wanted = " or ".join(each.__name__ for each in allowed)
            raise ConfigError(f"{path}: {key!r} must be {wanted}, not {type(entry).__name__}")


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that somebody made, and where."""

    name: str  # of the flag, without its dashes
    value: str
    origin: str


def given_settings(ctx: typer.Context) -> Iterator[Setting]:
    """Every setting that is not left to its default; keys are not shown."""
    for param in setting_params(ctx.command):
        assert param.name is not None
        source = ctx.get_parameter_source(param.name)
        origins = {
            "COMMANDLINE": "command line",
            "ENVIRONMENT": f"environment, {variable(param.name)}",
            "DEFAULT_MAP": f"file {ctx.params.get('config')}",
        }
        if source is not None and source.name in origins:
            value = ctx.params[param.name]
            shown = "(not shown)" if param.name in _SECRETS else _show(value)
            yield Setting(param.name.replace("_", "-"), shown, origins[source.name])


def _show(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def keys_on_command_line(ctx: typer.Context) -> list[str]:
    """The secrets that every user of the machine can read in the list of processes."""
    return [name for name in _SECRETS if is_on_command_line(ctx, name)]


def is_on_command_line(ctx: typer.Context, name: str) -> bool:
    """Whether the parameter was given there, and not left out or set elsewhere."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
