"""Traffic made up: arrivals of four kinds, with a wanted rate and burstiness."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import LONGEST_S, TraceError, refuse_endless
from morphserve.morphcli.traces.rows import Integers, Rows, sorted_rows
from morphserve.morphcli.traces.stats import dispersion as dispersion_of

_DRAWS = 32  # traces drawn where a target is to be met; the nearest is kept
_PROMPT_SIGMA, _OUTPUT_SIGMA = 0.7, 1.0  # of the logarithms; about those of Azure's conversations
_MOST_CV = 100
_CV, _DISPERSION = 3.0, 8.0  # where none is asked for
_MOST_REQUESTS = 50_000_000

_Floats = NDArray[np.float64]
_Source = Callable[[np.random.Generator], _Floats]  # times in seconds, in no order


class Kind(StrEnum):
    POISSON = "poisson"
    GAMMA = "gamma"
    ONOFF = "onoff"
    NBINOM = "nbinom"


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is to be made."""

    kind: Kind
    rate: float  # requests/s, mean
    seconds: float
    dispersion: float | None = None  # of counts per second; onoff and nbinom need it
    cv: float | None = None  # of gaps, for gamma
    burst_s: float = 15.0  # mean length of a burst, for onoff

    def __post_init__(self) -> None:
        for name in ("rate", "seconds", "burst_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.removesuffix('_s')} must be above 0")
        if self.seconds > LONGEST_S:
            raise ConfigError(f"--seconds must be at most {LONGEST_S:,.0f}")
        if not 1 <= self.rate * self.seconds <= _MOST_REQUESTS:
            raise ConfigError(
                f"--rate times --seconds must be between 1 and {_MOST_REQUESTS:,} requests"
            )
        if self.dispersion is None and self.kind in (Kind.ONOFF, Kind.NBINOM):
            raise ConfigError(f"{self.kind} needs --dispersion")
        if self.dispersion is not None and self.kind is Kind.POISSON:
            raise ConfigError("a Poisson process has dispersion 1: choose another kind")
        if self.dispersion is not None and not 1 < self.dispersion < 1e6:
            raise ConfigError("--dispersion must be above 1, which is that of a Poisson process")
        if self.cv is not None and (self.kind is not Kind.GAMMA or self.dispersion is not None):
            raise ConfigError("--cv is for gamma, without --dispersion")
        if self.cv is not None and not 0.05 <= self.cv <= _MOST_CV:
            raise ConfigError(f"--cv must be between 0.05 and {_MOST_CV}")


def traffic(
    kind: str,
    rate: float | None,
    seconds: float | None,
    dispersion: float | None,
    cv: float | None,
    burst_s: float,
    like: Rows | None,
) -> Traffic:
    """What was asked for; what was left out is that of `like`, where it is given."""
    if kind not in list(Kind):
        raise ConfigError(f"unknown kind {kind!r}: choose one of {', '.join(Kind)}")
    if like is not None:
        refuse_endless(like.source, like.span_s)
        span_s = max(like.span_s, 1.0)
        seconds = span_s if seconds is None else seconds
        rate = len(like) / span_s if rate is None else rate
        if dispersion is None and cv is None and kind != Kind.POISSON:
            dispersion = _dispersion_like(like)
    elif dispersion is None and kind in (Kind.ONOFF, Kind.NBINOM):
        dispersion = _DISPERSION
    if rate is None:
        raise ConfigError("give --rate in requests per second, or --like FILE")
    return Traffic(Kind(kind), rate, 300.0 if seconds is None else seconds, dispersion, cv, burst_s)


def _dispersion_like(like: Rows) -> float:
    found = dispersion_of(like.time_us)
    if found is None or found <= 1:
        raise ConfigError(f"{like.source} is no burstier than chance: make a poisson trace like it")
    return found


@dataclass(frozen=True, slots=True)
class MadeLengths:
    """Lognormal lengths with these means."""

    prompt_tokens: float = 1000.0
    output_tokens: float = 200.0

    def __post_init__(self) -> None:
        if not (1 <= self.prompt_tokens < 1e7 and 1 <= self.output_tokens < 1e7):
            raise ConfigError("--prompt-tokens and --output-tokens must be at least 1")


def make_rows(traffic: Traffic, lengths: MadeLengths | Rows, seed: int) -> Rows:
    """The traffic as rows; lengths are made, or drawn in pairs from a trace.

    Where a dispersion is wanted, several traces are drawn and the one nearest to it and to the
    rate is kept, since one bursty trace can be far off. Equal seeds give equal rows.
    """
    rng = np.random.default_rng(seed)
    draw = _source(traffic)
    times_s = _nearest(draw, traffic, rng) if traffic.dispersion else draw(rng)
    if not len(times_s):
        raise TraceError("no request came out: raise --rate or --seconds")
    prompts, outputs = _lengths(lengths, len(times_s), rng)
    stamps_us = _stamps_us(times_s)
    return sorted_rows("synthetic", "synthetic", stamps_us, prompts, outputs, is_dated=False)


def _source(traffic: Traffic) -> _Source:
    rate, seconds = traffic.rate, traffic.seconds
    if traffic.kind is Kind.POISSON:
        return lambda rng: rng.uniform(0, seconds, rng.poisson(rate * seconds))
    if traffic.kind is Kind.GAMMA:
        cv = _cv_of(rate, traffic.dispersion) if traffic.dispersion else traffic.cv or _CV
        return lambda rng: _gamma(rng, rate, seconds, cv)
    assert traffic.dispersion is not None
    wanted = traffic.dispersion
    if traffic.kind is Kind.NBINOM:
        return lambda rng: _nbinom(rng, rate, seconds, wanted)
    share = _on_share(rate, wanted, traffic.burst_s)
    return lambda rng: _on_off(rng, rate, seconds, share, traffic.burst_s)


def _nearest(draw: _Source, traffic: Traffic, rng: np.random.Generator) -> _Floats:
    def distance(times_s: _Floats) -> float:
        found = dispersion_of(_stamps_us(times_s)) if len(times_s) else None
        if not found:
            return math.inf
        assert traffic.dispersion is not None
        rate = len(times_s) / traffic.seconds
        return abs(math.log(found / traffic.dispersion)) + abs(math.log(rate / traffic.rate))

    return min((draw(rng) for _ in range(_DRAWS)), key=distance)


def _stamps_us(times_s: _Floats) -> Integers:
    """Since the first, in order."""
    stamps_us: Integers = (np.sort(times_s) * 1e6).astype(np.int64)
    return stamps_us - int(stamps_us[0])


def _nbinom(rng: np.random.Generator, rate: float, seconds: float, wanted: float) -> _Floats:
    """Counts per second of mean `rate` and variance `rate * wanted`, anywhere in their second."""
    counts = rng.negative_binomial(rate / (wanted - 1), 1 / wanted, math.ceil(seconds))
    times_s = np.repeat(np.arange(len(counts)), counts) + rng.random(int(counts.sum()))
    return times_s[times_s < seconds]


def _gamma(rng: np.random.Generator, rate: float, seconds: float, cv: float) -> _Floats:
    """Gaps of a Gamma distribution, on their way for long enough that the start is any moment."""
    before_s = 10 * cv * cv / rate
    end_s = before_s + seconds
    parts, at_s = [], 0.0
    while at_s < end_s:
        gaps = rng.gamma(1 / cv**2, cv**2 / rate, math.ceil(rate * (end_s - at_s)) + 100)
        parts.append(at_s + np.cumsum(gaps))
        at_s = float(parts[-1][-1])
    times_s = np.concatenate(parts)
    return times_s[(times_s >= before_s) & (times_s < end_s)] - before_s


def _cv_of(rate: float, wanted: float) -> float:
    """The variation of Gamma gaps whose counts per second have the wanted dispersion.

    Where a second holds many bursts there is a formula, see below. Elsewhere it is measured on
    long traces, of one seed at every step.
    """
    if rate >= 10 * wanted:
        # Over t seconds, counts of gaps of variation c vary by c² rate t + (1 - c⁴) / 6, for long
        # t. This is the c of the wanted variance at t = 1.
        return math.sqrt(3 * rate * (1 - math.sqrt(1 - (wanted - 1 / (6 * rate)) / (1.5 * rate))))
    seconds = max(100_000 / rate, min(200, 5_000_000 / rate))
    low, high = 0.0, math.log(_MOST_CV)
    for _ in range(16):
        middle = (low + high) / 2
        times_s = _gamma(np.random.default_rng(0), rate, seconds, math.exp(middle))
        found = dispersion_of(_stamps_us(times_s)) or 1.0
        low, high = (middle, high) if found < wanted else (low, middle)
    if high == math.log(_MOST_CV):
        raise ConfigError(
            f"gamma reaches no dispersion of {wanted:g} at {rate:g} requests/s: choose onoff or "
            "nbinom"
        )
    return math.exp((low + high) / 2)


def _on_off(
    rng: np.random.Generator, rate: float, seconds: float, share: float, burst_s: float
) -> _Floats:
    """Bursts of exponential length with Poisson arrivals; between them none."""
    calm_s = burst_s * (1 - share) / share
    is_on, at_s, parts = rng.random() < share, 0.0, []
    while at_s < seconds:
        end_s = at_s + rng.exponential(burst_s if is_on else calm_s)
        if is_on:
            width_s = min(end_s, seconds) - at_s
            parts.append(at_s + width_s * rng.random(rng.poisson(rate / share * width_s)))
        is_on, at_s = not is_on, end_s
    return np.concatenate(parts) if parts else np.empty(0)


def _on_share(rate: float, wanted: float, burst_s: float) -> float:
    """The share of time in bursts at which counts per second have the wanted dispersion.

    Two states that forget each other at rate c vary counts in one second by
    1 + rate * (1 - share) / share * 2 (c - 1 + exp(-c)) / c².
    """
    low, high = 1e-6, 1 - 1e-6
    for _ in range(60):
        share = (low + high) / 2
        c = 1 / (burst_s * (1 - share))
        found = 1 + rate * (1 - share) / share * 2 * (c + math.expm1(-c)) / c**2
        low, high = (low, share) if found < wanted else (share, high)
    return (low + high) / 2


def _lengths(
    lengths: MadeLengths | Rows, count: int, rng: np.random.Generator
) -> tuple[Integers, Integers]:
    if isinstance(lengths, Rows):
        drawn = rng.integers(0, len(lengths), count)
        return lengths.prompt_tokens[drawn], lengths.output_tokens[drawn]
    return (
        _lognormal(rng, lengths.prompt_tokens, _PROMPT_SIGMA, count),
        _lognormal(rng, lengths.output_tokens, _OUTPUT_SIGMA, count),
    )


def _lognormal(rng: np.random.Generator, mean: float, sigma: float, count: int) -> Integers:
    tokens = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return np.maximum(1, tokens.round()).astype(np.int64)
