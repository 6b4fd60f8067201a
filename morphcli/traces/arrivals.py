"""Requests as traces hold them: when they came, how long they were."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from morphserve.configs.errors import MorphError

_SHOWN_BAD_ROWS = 5
LONGEST_S = 40e6  # 15 months; its seconds still fit in memory


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
    reason: str  # what is wrong, then a colon and what the row holds


@dataclass(frozen=True, slots=True)
class Trace:
    """The readable rows of a file, in order of time, and the rows that were skipped."""

    path: str
    arrivals: tuple[Arrival, ...]
    bad_rows: tuple[BadRow, ...] = ()

    def describe_bad_rows(self) -> str:
        """One sentence that counts and names the skipped rows; empty without any."""
        return describe_bad_rows(self.path, self.bad_rows, len(self.arrivals))


def describe_bad_rows(path: str, bad_rows: Sequence[BadRow], num_good: int) -> str:
    """One sentence that counts and names the skipped rows of a file; empty without any."""
    if not bad_rows:
        return ""
    shown = "; ".join(f"line {bad.line}: {bad.reason}" for bad in bad_rows[:_SHOWN_BAD_ROWS])
    more = len(bad_rows) - _SHOWN_BAD_ROWS
    tail = f"; and {more} more" if more > 0 else ""
    total = len(bad_rows) + num_good
    return f"skipped {len(bad_rows)} of {total} rows of {path} ({shown}{tail})"


def refuse_endless(path: str, seconds: float, way_out: str = "") -> None:
    """Raises TraceError for a time so long that its seconds would not fit in memory."""
    if seconds > LONGEST_S:
        raise TraceError(
            f"{path} runs over {seconds / 86_400:,.0f} days, too long to count by the second: "
            f"is a stamp wrong, or the --time-unit?{way_out}"
        )


def count_reasons(bad_rows: Sequence[BadRow]) -> dict[str, int]:
    """How many rows were skipped for what, the most frequent first."""
    reasons = Counter(bad.reason.partition(":")[0] for bad in bad_rows)
    return dict(reasons.most_common())
