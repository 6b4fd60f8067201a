"""A line of a trace taken apart: CSV by the names of its header, JSON by its keys."""

import csv
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec

from morphserve.morphcli.traces.arrivals import TraceError
from morphserve.morphcli.traces.formats import Columns
from morphserve.morphcli.traces.lines import Lines
from morphserve.morphcli.traces.values import Value

Triple = tuple[Value, Value, Value]  # time, prompt, output as the file has them
# A line in, its triple out; None: left out by a filter. Raises ValueError, with the reason.
Splitter = Callable[[str], Triple | None]
Filters = Sequence[tuple[str, str]]

_SEPARATORS = {";": "semicolons", "\t": "tabs"}  # that a header may have in place of commas


def read_names(path: Path, lines: Lines) -> list[str]:
    """The names in a CSV header, or the keys of the first JSON line that has any."""
    first = lines.sample[0][1]
    if first.startswith("["):
        raise TraceError(
            f"{path} is a JSON array: write an object per line instead, for example with "
            "jq -c '.[]'"
        )
    if not is_json(lines):
        return _header(path, first)
    for _, line in lines.sample:
        try:
            return list(msgspec.json.decode(line, type=dict[str, Any]))
        except (msgspec.DecodeError, RecursionError):
            continue
    raise TraceError(f"{path} looks like JSON lines, but its first {len(lines.sample)} are none")


def is_json(lines: Lines) -> bool:
    """Whether the file holds JSON lines; else it is CSV."""
    return lines.sample[0][1].startswith("{")


def _header(path: Path, line: str) -> list[str]:
    try:
        names = [name.strip() for name in next(csv.reader([line]))]
    except csv.Error as error:
        raise TraceError(f"the header of {path} cannot be read: {error}") from error
    separators = (name for mark, name in _SEPARATORS.items() if line.count(mark) > line.count(","))
    if separator := next(separators, None):
        raise TraceError(f"{path} separates its fields by {separator}: write it with commas")
    return names


def csv_splitter(names: Sequence[str], columns: Columns, filters: Filters) -> Splitter:
    """Reads lines of a CSV file with this header."""
    triple_of = itemgetter(*map(names.index, (columns.time, columns.prompt, columns.output)))
    wanted = [(names.index(column), value) for column, value in filters]
    width = len(names)

    def split(line: str) -> Triple | None:
        fields = line.split(",") if '"' not in line else _quoted_fields(line)
        if len(fields) > width and any(map(str.strip, fields[width:])):
            # As of a comma in a number: columns may be shifted, so that none is to be trusted.
            raise ValueError(f"too many fields: {len(fields)} fields, the header has {width}")
        try:
            triple: Triple = triple_of(fields)
            for position, value in wanted:
                if fields[position].strip() != value:
                    return None
        except IndexError:
            found = f"{len(fields)} field{'s' * (len(fields) != 1)}"
            raise ValueError(f"too few fields: {found}, the header has {width}") from None
        return triple

    return split


def _quoted_fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise ValueError(f"not CSV: {error}") from None


def json_splitter(columns: Columns, filters: Filters) -> Splitter:
    """Reads JSON objects; what else they hold is skipped without being built."""
    named = {"time": columns.time, "prompt": columns.prompt, "output": columns.output}
    named |= {f"filter_{i}": column for i, (column, _) in enumerate(filters)}
    fields = [(name, Value) for name in ("time", "prompt", "output")]
    optional = [(f"filter_{i}", Any, None) for i in range(len(filters))]
    row = msgspec.defstruct("Row", [*fields, *optional], rename=named)
    decode = msgspec.json.Decoder(row).decode
    wanted = [(f"filter_{i}", value) for i, (_, value) in enumerate(filters)]

    def split(line: str) -> Triple | None:
        try:
            found: Any = decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"not a request: {error}") from None
        if any(str(getattr(found, name)) != value for name, value in wanted):
            return None
        return found.time, found.prompt, found.output

    return split
