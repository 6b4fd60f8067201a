"""Traces written in a form that the readers know."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import TraceError
from morphserve.morphcli.traces.rows import Rows

_BATCH = 100_000  # rows made to text at once
_DATED = "TIMESTAMP,ContextTokens,GeneratedTokens"
_UNDATED = "arrived_at,num_prefill_tokens,num_decode_tokens"


def refuse_to_replace(path: Path, force: bool) -> None:
    """Raises ConfigError for a file that is there, before work is done for nothing."""
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already: give --force to replace it")


def write_rows(path: Path, rows: Rows, remarks: Sequence[str] = ()) -> None:
    """A CSV file with Azure's columns, or Vidur's where stamps tell no date.

    The source's comments come first, since they may say whose the data are, then the remarks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                _write(file, rows, remarks)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise TraceError(f"cannot write {path}: {error.strerror}") from error


def _write(file: TextIO, rows: Rows, remarks: Sequence[str]) -> None:
    for line in (*rows.comments, *(f"# {remark}" for remark in remarks)):
        file.write(f"{line}\n")
    file.write(f"{_UNDATED if rows.start_us is None else _DATED}\n")
    for text in _lines(rows):
        file.write(text)


def _lines(rows: Rows) -> Iterator[str]:
    for start in range(0, len(rows), _BATCH):
        part = slice(start, start + _BATCH)
        stamps = _stamps(rows, part)
        tokens = rows.prompt_tokens[part].tolist(), rows.output_tokens[part].tolist()
        yield "".join(
            f"{at},{prompt},{out}\n" for at, prompt, out in zip(stamps, *tokens, strict=True)
        )


def _stamps(rows: Rows, part: slice) -> list[str]:
    time_us = rows.time_us[part]
    if rows.start_us is None:
        return [f"{at // 1_000_000}.{at % 1_000_000:06d}" for at in time_us.tolist()]
    dates = np.datetime_as_string((time_us + rows.start_us).astype("datetime64[us]"))
    return [date.replace("T", " ") for date in dates.tolist()]
