"""What a trace looks like: rates, how bursty they are, lengths."""

import math
from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np
from numpy.typing import NDArray

from morphserve.morphcli.traces.arrivals import count_reasons, refuse_endless
from morphserve.morphcli.traces.rows import Integers, Rows

_MINUTE_S = 60


class Gaps(msgspec.Struct, frozen=True):
    """Between a request and the next."""

    cv: float | None  # standard deviation over mean; None: all at once
    p50_s: float
    p99_s: float
    max_s: float


class Dispersion(msgspec.Struct, frozen=True):
    """Variance over mean of the counts in windows of so many seconds; 1 is a Poisson process.

    None where the trace holds fewer than two whole windows.
    """

    per_1s: float | None
    per_10s: float | None
    per_60s: float | None


class Autocorrelation(msgspec.Struct, frozen=True):
    """Of counts per second with those some seconds later; None for a trace that is too short."""

    lag_1s: float | None
    lag_5s: float | None
    lag_30s: float | None


class Seconds(msgspec.Struct, frozen=True):
    total: int
    empty: int
    max_requests: int


class SlidingMinute(msgspec.Struct, frozen=True):
    """Requests per second over 60 s, from every whole second on."""

    min: float
    mean: float
    max: float
    max_starts_s: int


class Lengths(msgspec.Struct, frozen=True):
    """Tokens of one request."""

    mean: float
    p50: int
    p90: int
    p99: int
    max: int


class Offered(msgspec.Struct, frozen=True):
    """Tokens that arrive per second."""

    mean: float | None
    minute_max: float | None  # over 60 s; None for a shorter trace


class Description(msgspec.Struct, frozen=True):
    file: str
    format: str
    start: str | None  # ISO 8601, UTC; None: stamps tell no date
    requests: int
    left_out: int  # rows that --where does not want
    bad_rows: int
    bad_reasons: dict[str, int]
    span_s: float
    rate: float | None  # requests/s; None: all at once
    gaps: Gaps | None  # None for a single request
    dispersion: Dispersion
    autocorrelation: Autocorrelation
    seconds: Seconds
    minute: SlidingMinute | None  # None for a trace of less than 60 s
    prompt_tokens: Lengths
    output_tokens: Lengths
    offered_prompt: Offered
    offered_output: Offered


def describe(rows: Rows) -> Description:
    """The figures of a trace."""
    counts = counts_per_second(rows)
    return Description(
        file=rows.source,
        format=rows.format,
        start=_date(rows.start_us),
        requests=len(rows),
        left_out=rows.left_out,
        bad_rows=len(rows.bad_rows),
        bad_reasons=count_reasons(rows.bad_rows),
        span_s=rows.span_s,
        rate=len(rows) / rows.span_s if rows.span_s else None,
        gaps=_gaps(rows.time_us),
        dispersion=Dispersion(*(dispersion(rows.time_us, width_s) for width_s in (1, 10, 60))),
        autocorrelation=Autocorrelation(*(_autocorrelation(counts, lag) for lag in (1, 5, 30))),
        seconds=Seconds(len(counts), int((counts == 0).sum()), int(counts.max())),
        minute=_sliding_minute(counts),
        prompt_tokens=_lengths(rows.prompt_tokens),
        output_tokens=_lengths(rows.output_tokens),
        offered_prompt=_offered(rows, rows.prompt_tokens),
        offered_output=_offered(rows, rows.output_tokens),
    )


def counts_per_second(rows: Rows, weights: Integers | None = None) -> NDArray[np.float64]:
    """Requests, or the sum of their weights, in each second from the first row on.

    Raises TraceError for a trace so long that its seconds would not fit in memory.
    """
    refuse_endless(rows.source, rows.span_s)
    return np.bincount(rows.time_us // 1_000_000, weights=weights).astype(np.float64)


def dispersion(time_us: Integers, width_s: int = 1) -> float | None:
    """Variance over mean of the counts in whole windows; None with fewer than two of them."""
    windows = int(time_us[-1]) // (width_s * 1_000_000)
    if windows < 2:
        return None
    counts = np.bincount(time_us // (width_s * 1_000_000), minlength=windows)[:windows]
    return float(counts.var() / counts.mean())


def _date(start_us: int | None) -> str | None:
    if start_us is None:
        return None
    try:
        at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=start_us)
    except OverflowError:  # a count of seconds that no calendar holds
        return None
    return at.isoformat().replace("+00:00", "Z")


def _gaps(time_us: Integers) -> Gaps | None:
    gaps = np.diff(time_us) / 1e6
    if not len(gaps):
        return None
    p50, p99 = np.percentile(gaps, [50, 99])
    mean = gaps.mean()
    cv = float(gaps.std() / mean) if mean else None
    return Gaps(cv, float(p50), float(p99), float(gaps.max()))


def _autocorrelation(counts: NDArray[np.float64], lag: int) -> float | None:
    if len(counts) < 2 * lag + 1:
        return None
    around = counts - counts.mean()
    variance = float((around * around).sum())
    return float((around[:-lag] * around[lag:]).sum()) / variance if variance else None


def _sliding_minute(counts: NDArray[np.float64]) -> SlidingMinute | None:
    if len(counts) < _MINUTE_S:
        return None
    rates = sliding_sums(counts, _MINUTE_S) / _MINUTE_S
    return SlidingMinute(
        float(rates.min()), float(rates.mean()), float(rates.max()), int(rates.argmax())
    )


def sliding_sums(counts: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The sum of `width` neighbours, from every place on where there are so many."""
    sums = np.concatenate(([0.0], np.cumsum(counts)))
    return sums[width:] - sums[:-width]


def _lengths(tokens: Integers) -> Lengths:
    # Nearest rank: a length that no request has would be none of this trace.
    ranked = np.sort(tokens)
    p50, p90, p99 = (int(ranked[math.ceil(len(ranked) * p) - 1]) for p in (0.5, 0.9, 0.99))
    return Lengths(float(ranked.mean()), p50, p90, p99, int(ranked[-1]))


def _offered(rows: Rows, tokens: Integers) -> Offered:
    per_second = counts_per_second(rows, tokens)
    minutes = sliding_sums(per_second, _MINUTE_S) if len(per_second) >= _MINUTE_S else None
    return Offered(
        float(tokens.sum()) / rows.span_s if rows.span_s else None,
        None if minutes is None else float(minutes.max()) / _MINUTE_S,
    )
