"""The command that follows one of `morph trace`, with what it takes to read the same rows."""

import math
import shlex
from pathlib import Path

from morphserve.morphcli.traces.readers import Reading
from morphserve.morphcli.traces.windows import PARTS, Candidate

WINDOW_S = 300  # that `morph trace window` looks for, unless told


def after_describe(file: Path, reading: Reading, seconds: int) -> str:
    if window := _try_window(_words(file, reading), seconds):
        return window
    if _can_bench(reading):
        return _try_bench(_words(file, reading))
    # `morph trace merge` rewrites a single file, and with the rows that are wanted alone.
    return _write_first("merge", [*_words(file, reading), "--output", "part.csv"])


def after_window(file: Path, reading: Reading, window: Candidate, options: list[str]) -> str:
    """`options` are those by which the window was found."""
    words = _words(file, reading)
    if _can_bench(reading):
        return _try_bench([*words, "--window", str(window)])
    return _write_first("window", [*words, *options, "--output", "part.csv"])


def after_writing(file: Path, span_s: float) -> str:
    """Of a file that takes no options to be read."""
    return _try_window([str(file)], math.ceil(span_s)) or _try_bench([str(file)])


def after_slice(file: Path) -> str:
    return _try_bench([str(file)])


def _words(file: Path, reading: Reading) -> list[str]:
    """The file and all options that differ from the defaults, for any command that has them."""
    words = [str(file)]
    if columns := reading.columns:
        words += [
            "--map",
            f"time={columns.time},prompt={columns.prompt},output={columns.output}",
        ]
    if reading.time_unit:
        words += ["--time-unit", reading.time_unit.value]
    if reading.spread_s is not None:
        words += ["--spread", f"{reading.spread_s:.12g}"]
    for column, value in reading.where:
        words += ["--where", f"{column}={value}"]
    return [*words, *(["--seed", str(reading.seed)] if reading.seed else [])]


def _can_bench(reading: Reading) -> bool:
    """Whether `morph bench` has the options to read the same rows at the same times."""
    return reading.spread_s is None and not reading.where


def _try_window(trace: list[str], seconds: int) -> str | None:
    """None for a trace too short to have windows."""
    if seconds < PARTS:
        return None
    shorter = [] if seconds > WINDOW_S else ["--seconds", str(max(PARTS, seconds // 2))]
    return f"find its burst: morph trace window {shlex.join([*trace, *shorter])}"


def _try_bench(trace: list[str]) -> str:
    return f"try: morph bench MODEL --trace {shlex.join(trace)}"


def _write_first(command: str, words: list[str]) -> str:
    line = f"morph trace {command} {shlex.join(words)}"
    return f"morph bench takes no --where and no --spread, so write the rows first: {line}"
