"""Reading of request traces."""

import csv
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from morphserve.morphcli.traces.arrivals import Arrival, BadRow, Trace, TraceError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_trace(path: Path) -> Trace:
    """All rows of an Azure LLM inference trace; lines that start with # are comments.

    Raises TraceError if the file cannot be read, lacks a column, or holds no usable row.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read trace {path}: {error}") from error
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if _is_data(line)]
    if not lines:
        raise TraceError(f"{path} is empty: a trace needs a header with {', '.join(COLUMNS)}")
    positions = _positions(path, lines[0][1])
    rows, bad_rows = _parse_rows(lines[1:], positions)
    if not rows:
        first = f" (line {bad_rows[0].line}: {bad_rows[0].reason})" if bad_rows else ""
        raise TraceError(f"{path} holds no usable row{first}")
    rows.sort(key=lambda row: row[0])
    start = rows[0][0]
    arrivals = (Arrival((at - start).total_seconds(), *tokens) for at, tokens in rows)
    return Trace(str(path), tuple(arrivals), tuple(bad_rows))


def _is_data(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#")


def _positions(path: Path, header: str) -> list[int]:
    try:
        names = [name.strip() for name in next(csv.reader([header]))]
    except csv.Error as error:
        raise TraceError(f"the header of {path} cannot be read: {error}") from error
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise TraceError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"its header is {', '.join(names)}"
        )
    return [names.index(column) for column in COLUMNS]


_Row = tuple[datetime, tuple[int, int]]


def _parse_rows(
    lines: Iterable[tuple[int, str]], positions: Sequence[int]
) -> tuple[list[_Row], list[BadRow]]:
    rows: list[_Row] = []
    bad_rows: list[BadRow] = []
    for number, line in lines:
        try:
            rows.append(_parse_row(next(csv.reader([line])), positions))
        except (ValueError, csv.Error) as error:
            bad_rows.append(BadRow(number, str(error)))
    return rows, bad_rows


def _parse_row(fields: Sequence[str], positions: Sequence[int]) -> _Row:
    if len(fields) <= max(positions):
        raise ValueError(f"{len(fields)} fields")
    time, prompt, output = (fields[i].strip() for i in positions)
    try:
        at = datetime.fromisoformat(time)
    except ValueError:
        raise ValueError(f"TIMESTAMP is not a time: {time!r}") from None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return at, (_tokens(prompt, COLUMNS[1]), _tokens(output, COLUMNS[2]))


def _tokens(text: str, column: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{column} is not a count of tokens: {text!r}")
    return int(text)
