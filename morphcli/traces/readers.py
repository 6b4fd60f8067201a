"""Reading of request traces, whatever their format."""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import Arrival, BadRow, Trace, TraceError
from morphserve.morphcli.traces.formats import (
    Columns,
    Format,
    TimeUnit,
    find_format,
    mapped_format,
    require,
)
from morphserve.morphcli.traces.lines import Lines, Numbered, open_lines
from morphserve.morphcli.traces.rows import Integers, Rows, sorted_rows
from morphserve.morphcli.traces.tables import (
    Splitter,
    csv_splitter,
    is_json,
    json_splitter,
    read_names,
)
from morphserve.morphcli.traces.values import (
    Value,
    count_tokens,
    is_since_1970,
    stamp_reader,
    tell_unit,
)

_FAILED = "the request failed: it has no output token"


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file is to be read, beyond what its header tells."""

    columns: Columns | None = None  # None: those of the format that the header tells
    time_unit: TimeUnit | None = None  # None: the format's, or what the stamps look like
    spread_s: float | None = None  # stamps are spread over so much; None: as the format wants
    where: tuple[tuple[str, str], ...] = ()  # columns and the values that rows must have there
    seed: int = 0  # of the spreading

    def __post_init__(self) -> None:
        if self.spread_s is not None and not 0 <= self.spread_s < 1e9:
            raise ConfigError("--spread must be a number of seconds, 0 or more")


_PLAIN = Reading()


def read_trace(path: Path, reading: Reading = _PLAIN) -> Trace:
    """All requests of a trace file; lines that start with # are comments.

    Raises TraceError if the file cannot be read, is of no known format, or holds no usable row.
    """
    rows = read_rows(path, reading)
    times_s = (rows.time_us / 1e6).tolist()
    lengths = rows.prompt_tokens.tolist(), rows.output_tokens.tolist()
    return Trace(rows.source, tuple(map(Arrival, times_s, *lengths)), rows.bad_rows)


def read_rows(path: Path, reading: Reading = _PLAIN) -> Rows:
    """The same as columns, which hold tens of millions of requests."""
    with open_lines(path) as lines:
        layout = _layout(path, lines, reading)
        found = _parse(lines.all() if is_json(lines) else lines.after_header(), layout)
    if not found.stamps_us:
        raise TraceError(f"{path} holds no usable row{_why(found)}")
    stamps_us = _spread(_integers(found.stamps_us), layout.format, reading)
    return sorted_rows(
        str(path),
        layout.format.name,
        stamps_us,
        _integers(found.prompt_tokens),
        _integers(found.output_tokens),
        is_dated=is_since_1970(int(stamps_us.min()), layout.unit),
        bad_rows=found.bad_rows,
        left_out=found.left_out,
        comments=lines.comments,
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """What is known of a file before its first row is read."""

    format: Format
    unit: TimeUnit
    split: Splitter


def _layout(path: Path, lines: Lines, reading: Reading) -> _Layout:
    names = read_names(path, lines)
    if reading.columns is None:
        format = find_format(str(path), names)
    else:
        format = mapped_format(str(path), reading.columns, names)
    require(str(path), [column for column, _ in reading.where], names)
    if is_json(lines):
        split = json_splitter(format.columns, reading.where)
    else:
        split = csv_splitter(names, format.columns, reading.where)
    unit = reading.time_unit or format.unit
    if unit is None:
        unit = tell_unit(format.columns.time, _stamps(lines.sample, split))
    return _Layout(format, unit, split)


def _stamps(sample: Iterable[Numbered], split: Splitter) -> Iterable[Value]:
    for _, line in sample:
        try:
            triple = split(line)
        except ValueError:
            continue
        if triple is not None:
            yield triple[0]


@dataclass(slots=True)
class _Found:
    """What a file holds, in its order."""

    stamps_us: "array[int]" = field(default_factory=lambda: array("q"))
    prompt_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    output_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    bad_rows: list[BadRow] = field(default_factory=list)
    left_out: int = 0


def _parse(lines: Iterable[Numbered], layout: _Layout) -> _Found:
    # Files have tens of millions of rows: what this loop calls is looked up before it.
    found, split, columns = _Found(), layout.split, layout.format.columns
    stamp_us = stamp_reader(layout.unit, columns.time)
    count_output = _output_counter(layout.format)
    add_stamp, add_prompt = found.stamps_us.append, found.prompt_tokens.append
    add_output = found.output_tokens.append
    for number, line in lines:
        try:
            triple = split(line)
            if triple is None:
                found.left_out += 1
                continue
            stamp = stamp_us(triple[0])
            output = count_output(triple[2], columns.output)
            prompt = count_tokens(triple[1], columns.prompt)
        except ValueError as error:
            found.bad_rows.append(BadRow(number, str(error)))
            continue
        add_stamp(stamp)
        add_prompt(prompt)
        add_output(output)
    return found


def _output_counter(format: Format) -> Callable[[Value, str], int]:
    if not format.has_failures:
        return count_tokens

    def count(value: Value, column: str) -> int:
        if value in ("0", 0):
            raise ValueError(_FAILED)
        return count_tokens(value, column)

    return count


def _why(found: _Found) -> str:
    """Why no row of a file is usable, in brackets."""
    reasons = [f"line {bad.line}: {bad.reason}" for bad in found.bad_rows[:1]]
    if found.left_out:
        reasons.append(f"--where leaves out {found.left_out}")
    return f" ({'; '.join(reasons)})" if reasons else ""


def _integers(values: "array[int]") -> Integers:
    return np.frombuffer(values, dtype=np.int64)


def _spread(stamps_us: Integers, format: Format, reading: Reading) -> Integers:
    """Rows of one stamp, spread over the time until the next stamp that the file could tell."""
    spread_s = reading.spread_s
    if spread_s is None:
        spread_s = 0.0 if (stamps_us % 1_000_000).any() else format.spread_s
    if spread_s == 0:
        return stamps_us
    offsets = np.random.default_rng(reading.seed).random(len(stamps_us)) * spread_s * 1e6
    return stamps_us + offsets.astype(np.int64)
