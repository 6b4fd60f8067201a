"""Windows of a trace that are worth a replay: calm, burst, calm; or the densest."""

from collections.abc import Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import TraceError
from morphserve.morphcli.traces.rows import Rows
from morphserve.morphcli.traces.stats import counts_per_second, sliding_sums

PARTS = 20  # that a window's shape is told in
_CALM_PARTS = 4  # at each end
_LEAST_BURST = 10  # requests in one part; fewer are no burst, however rare others are

_Floats = NDArray[np.float64]


class Candidate(msgspec.Struct, frozen=True):
    start_s: int  # since the first row
    end_s: int
    first_row: int  # among the usable rows in order of time, from 0
    end_row: int  # the first one after the window
    rate: float  # requests/s
    peak_1s: float  # requests/s in the densest second
    peak_10s: float  # and in the densest 10 s
    prompt_tokens: float  # mean
    output_tokens: float  # mean
    shape: list[float]  # requests/s in each twentieth

    @property
    def requests(self) -> int:
        return self.end_row - self.first_row

    def __str__(self) -> str:
        return f"t:{self.start_s}-{self.end_s}"


def find_windows(
    rows: Rows, seconds: int, *, densest: bool = False, most: int = 5
) -> list[Candidate]:
    """The best windows of so many seconds, none over another, the best first.

    Unless the densest are wanted, the best lead from calm through the highest burst back to calm.
    Raises TraceError if there is none.
    """
    if seconds < PARTS:
        raise ConfigError(f"--seconds must be at least {PARTS}")
    counts = counts_per_second(rows)
    if len(counts) < PARTS:
        raise TraceError(
            f"{rows.source} lasts {len(counts)} s, and a window {PARTS} s at least: replay it whole"
        )
    if len(counts) < seconds:
        raise TraceError(
            f"{rows.source} lasts {len(counts)} s: give --seconds {len(counts)} or less"
        )
    scores = sliding_sums(counts, seconds) if densest else _lifts(counts, seconds)
    starts = list(_best(scores, seconds, most))
    if not starts:
        raise TraceError(
            f"{rows.source} has no burst between calm in any {seconds} s: try other --seconds, or "
            "--densest"
        )
    return [_window(rows, counts, start, seconds) for start in starts]


def _lifts(counts: _Floats, seconds: int) -> _Floats:
    """How far the burst of the window from each second rises over the window's calm ends.

    0 where it is no burst: not over twice the calm rate by three standard deviations of chance.
    A burst in the window's middle counts in full, one at its edge for nothing.
    """
    edges = np.linspace(0, seconds, PARTS + 1).round().astype(int)
    sums = np.concatenate(([0.0], np.cumsum(counts)))
    num_starts = len(counts) - seconds + 1

    def rates(part: int) -> _Floats:
        low, high = edges[part], edges[part + 1]
        inside: _Floats = sums[high : high + num_starts] - sums[low : low + num_starts]
        return inside / float(high - low)

    # Part by part: all parts of all windows at once would not fit for a trace of months.
    calm, peak = np.zeros(num_starts), np.zeros(num_starts)
    for part in range(PARTS):
        is_end = part < _CALM_PARTS or part >= PARTS - _CALM_PARTS
        np.maximum(calm if is_end else peak, rates(part), out=calm if is_end else peak)
    excess, moment = np.zeros(num_starts), np.zeros(num_starts)
    for part in range(_CALM_PARTS, PARTS - _CALM_PARTS):
        over = np.maximum(rates(part) - calm, 0)
        excess += over
        moment += over * (part + 0.5)
    width_s = seconds / PARTS
    least = np.maximum(2 * calm + 3 * np.sqrt(calm / width_s), _LEAST_BURST / width_s)
    centre = moment / np.maximum(excess, 1e-9) / PARTS
    return np.where(peak >= least, (peak - calm) * (1 - 2 * np.abs(centre - 0.5)), 0.0)


def _best(scores: _Floats, seconds: int, most: int) -> Iterator[int]:
    scores = scores.copy()
    for _ in range(most):
        start = int(scores.argmax())
        if scores[start] <= 0:
            return
        yield start
        scores[max(0, start - seconds + 1) : start + seconds] = 0


def _window(rows: Rows, counts: _Floats, start: int, seconds: int) -> Candidate:
    end = start + seconds
    first_row, end_row = np.searchsorted(rows.time_us, [start * 1_000_000, end * 1_000_000])
    inside = counts[start:end]
    edges = np.linspace(0, seconds, PARTS + 1).round().astype(int)
    shape = np.add.reduceat(inside, edges[:-1]) / np.diff(edges)
    return Candidate(
        start_s=start,
        end_s=end,
        first_row=int(first_row),
        end_row=int(end_row),
        rate=float(inside.sum()) / seconds,
        peak_1s=float(inside.max()),
        peak_10s=float(sliding_sums(inside, 10).max()) / 10,
        prompt_tokens=float(rows.prompt_tokens[first_row:end_row].mean()),
        output_tokens=float(rows.output_tokens[first_row:end_row].mean()),
        shape=shape.tolist(),
    )
