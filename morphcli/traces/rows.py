"""The rows of a trace as columns: what tens of millions of requests are held in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from morphserve.morphcli.traces.arrivals import BadRow

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """The usable rows of a file in order of time, and what is to be said of the others."""

    source: str  # the file's path
    format: str
    start_us: int | None  # of the first row, since 1970; None: stamps tell no date
    time_us: Integers  # since the first row
    prompt_tokens: Integers
    output_tokens: Integers
    bad_rows: tuple[BadRow, ...] = ()
    left_out: int = 0  # rows that the reader was told to leave out
    comments: tuple[str, ...] = ()  # lines at the file's head that start with #

    def __len__(self) -> int:
        return len(self.time_us)

    @property
    def span_s(self) -> float:
        """From the first row to the last."""
        return float(self.time_us[-1]) / 1e6

    def cut(self, first: int, end: int) -> "Rows":
        """The rows from index `first` to before `end`, of which there must be one."""
        offset_us = int(self.time_us[first])
        return replace(
            self,
            start_us=None if self.start_us is None else self.start_us + offset_us,
            time_us=self.time_us[first:end] - offset_us,
            prompt_tokens=self.prompt_tokens[first:end],
            output_tokens=self.output_tokens[first:end],
            bad_rows=(),
            left_out=0,
        )


def sorted_rows(
    source: str,
    format: str,
    stamps_us: Integers,
    prompt_tokens: Integers,
    output_tokens: Integers,
    *,
    is_dated: bool,
    bad_rows: Sequence[BadRow] = (),
    left_out: int = 0,
    comments: Sequence[str] = (),
) -> Rows:
    """Rows by their stamps, of which there must be one; equal stamps keep their order."""
    order = np.argsort(stamps_us, kind="stable")
    start_us = int(stamps_us[order[0]])
    return Rows(
        source,
        format,
        start_us if is_dated else None,
        stamps_us[order] - start_us,
        prompt_tokens[order],
        output_tokens[order],
        tuple(bad_rows),
        left_out,
        tuple(comments),
    )
