"""Presets and sizes: from what a user writes to the dataclasses of `schema`."""

import difflib
import re
import tomllib
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from morphserve.configs.errors import ConfigError
from morphserve.configs.schema import Policy, Slo

DEMO_MODEL = "demo"
PRESETS = ("accuracy", "balanced", "performance", "off", "static")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def resolve_model(name: str) -> Path:
    """The folder of a model: `demo` is the one shipped with the product."""
    if name == DEMO_MODEL:
        return Path(str(resources.files("morphserve.morphcli").joinpath("demo_model")))
    return Path(name).expanduser()


def load_policy(name: str) -> Policy:
    """A preset by name, `static:N`, or the path of a TOML file with the same keys."""
    if name.startswith("static:"):
        return _static(name)
    if name in PRESETS and name != "static":
        return _parse(resources.files("morphserve.configs").joinpath(f"{name}.toml").read_text())
    if name.endswith(".toml"):
        return _parse(_read(Path(name)))
    choices = "accuracy, balanced, performance, off, static:N, static:all, or a .toml file"
    raise ConfigError(f"unknown policy {name!r}: choose one of {choices}")


def _static(name: str) -> Policy:
    count = name.removeprefix("static:")
    if count != "all" and not count.isdigit():
        raise ConfigError(f"{name!r}: write static:N with N layers, or static:all")
    text = resources.files("morphserve.configs").joinpath("static.toml").read_text()
    layers = 1_000_000 if count == "all" else int(count)
    return replace(_parse(text), name=name, static_layers=layers)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read policy file {path}: {error}") from error


def _parse(text: str) -> Policy:
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"policy file is not valid TOML: {error}") from error
    known = {field.name: field.type for field in fields(Policy)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key {key!r} in policy file: did you mean {near!r}?")
        wanted = known[key]
        if wanted is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not wanted:
            raise ConfigError(f"policy key {key!r} must be {wanted.__name__}, not {value!r}")  # type: ignore[union-attr]
    missing = known.keys() - values.keys()
    if missing:
        raise ConfigError(f"policy file lacks {', '.join(sorted(missing))}")
    return Policy(**values)


def parse_bytes(text: str) -> int:
    """Bytes in `96MiB`, `1.5GB`, `2G` or `1000000`; binary units have an i."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if match is None:
        raise ConfigError(f"{text!r} is not a size: write for example 96MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_slo(text: str) -> Slo:
    """Targets from `ttft=2s,tpot=200ms`; either may be left out."""
    targets: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(ttft|tpot)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", part)
        if match is None:
            raise ConfigError(f"--slo {text!r}: write for example ttft=2s,tpot=200ms")
        targets[f"{match[1]}_s"] = float(match[2]) / (1000 if match[3] == "ms" else 1)
    if not all(targets.values()):
        raise ConfigError(f"--slo {text!r}: targets are above 0, as in ttft=2s,tpot=200ms")
    return Slo(**targets)
