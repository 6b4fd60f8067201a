"""Requests as traces hold them: when they came, how long they were."""

from dataclasses import dataclass

from morphserve.configs.errors import MorphError

_SHOWN_BAD_ROWS = 5


class TraceError(MorphError):
    """A trace file cannot be replayed; the message names the file and what it lacks."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    time_s: float  # since the start of the file or window
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class BadRow:
    line: int  # in the file, from 1
    reason: str


@dataclass(frozen=True, slots=True)
class Trace:
    """The readable rows of a file, in order of time, and the rows that were skipped."""

    path: str
    arrivals: tuple[Arrival, ...]
    bad_rows: tuple[BadRow, ...] = ()

    def describe_bad_rows(self) -> str:
        """One sentence that counts and names the skipped rows; empty without any."""
        if not self.bad_rows:
            return ""
        shown = "; ".join(
            f"line {bad.line}: {bad.reason}" for bad in self.bad_rows[:_SHOWN_BAD_ROWS]
        )
        more = len(self.bad_rows) - _SHOWN_BAD_ROWS
        tail = f"; and {more} more" if more > 0 else ""
        total = len(self.bad_rows) + len(self.arrivals)
        return f"skipped {len(self.bad_rows)} of {total} rows of {self.path} ({shown}{tail})"
