"""The lines of a trace file, plain or gzipped, and the comments at its head."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from morphserve.morphcli.traces.arrivals import TraceError

Numbered = tuple[int, str]  # a line of the file, from 1, and its text without outer blanks

_GZIP = b"\x1f\x8b"
_SAMPLE = 100  # lines that may be looked at before the first is parsed


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines that hold data: comments, which start with #, and blank lines are left out."""

    comments: tuple[str, ...]  # of the head
    sample: tuple[Numbered, ...]  # the first ones
    rest: Iterator[Numbered]

    def after_header(self) -> Iterator[Numbered]:
        return chain(self.sample[1:], self.rest)

    def all(self) -> Iterator[Numbered]:
        return chain(self.sample, self.rest)


@contextmanager
def open_lines(path: Path) -> Iterator[Lines]:
    """Raises TraceError if the file cannot be read, now or later, or has no line of data."""
    try:
        with _open(path) as file:
            comments: list[str] = []
            data = _data(file, comments)
            sample = tuple(islice(data, _SAMPLE))
            if not sample:
                raise TraceError(f"{path} is empty: a trace has a header and a row per request")
            if "\0" in sample[0][1] or "\ufffd" in sample[0][1]:
                raise TraceError(f"cannot read trace {path}: it is not text")
            yield Lines(tuple(comments), sample, data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error  # not the path once more
        raise TraceError(f"cannot read trace {path}: {reason}") from error


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        is_gzip = file.read(2) == _GZIP
    # A byte that is no UTF-8 spoils its field, not the file.
    if is_gzip:
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace")
    return path.open(encoding="utf-8-sig", errors="replace")


def _data(file: TextIO, comments: list[str]) -> Iterator[Numbered]:
    """The lines of data; comments before the first are kept."""
    at_head = True
    for number, line in enumerate(file, 1):
        text = line.strip()
        if not text:
            continue
        if text[0] != "#":
            at_head = False
            yield number, text
        elif at_head:
            comments.append(text)
