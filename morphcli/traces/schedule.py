"""The schedule of a replay: a trace cut to a window and scaled, and where its burst lies."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import Arrival, Trace, TraceError, refuse_endless
from morphserve.morphcli.traces.rows import Integers

_LEAST_BURST = 10  # arrivals in 5 s; fewer are no burst, however rare others are


@dataclass(frozen=True, slots=True)
class Shape:
    """How a trace is cut and scaled for one replay."""

    window_s: tuple[float, float] | None = None  # seconds of the file; None: all of it
    window_rows: tuple[int, int] | None = None  # usable rows, in order of time; overrules
    rate_scale: float = 1.0  # requests per second times this; the shape stays
    time_scale: float = 1.0  # seconds times this; 0.5 replays twice as fast
    length_scale: float = 1.0  # tokens of prompts and outputs times this
    output_scale: float = 1.0  # tokens of outputs times this, on top of length_scale
    max_prompt: int | None = None  # tokens
    max_output: int | None = None  # tokens
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate_scale", "time_scale", "length_scale", "output_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0")
        for name in ("max_prompt", "max_output"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1 token")

    def at(self, rate: float) -> "Shape":
        """The same at so many times its requests per second."""
        return replace(self, rate_scale=self.rate_scale * rate)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What one replay sends."""

    arrivals: tuple[Arrival, ...]
    duration_s: float
    clipped_prompts: int = 0  # requests cut to max_prompt
    clipped_outputs: int = 0  # requests cut to max_output


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a file, in seconds since its first row or in rows."""

    seconds: tuple[float, float] | None = None
    rows: tuple[int, int] | None = None


def parse_window(text: str) -> Window:
    """Seconds of `t:A-B`, or rows from A to before B of `idx:A-B`."""
    unit, _, bounds = text.partition(":")
    start, dash, end = bounds.partition("-")
    if unit == "idx" and start.isdecimal() and end.isdecimal() and int(start) < int(end):
        return Window(rows=(int(start), int(end)))
    try:
        seconds = float(start), float(end)
    except ValueError:
        seconds = 0.0, 0.0
    if unit != "t" or not dash or not 0 <= seconds[0] < seconds[1] < math.inf:
        raise ConfigError(
            f"--window {text!r}: write t:A-B in seconds or idx:A-B in rows, B the first one after "
            "them, for example t:92-154 or idx:0-100"
        )
    return Window(seconds)


def shape_trace(trace: Trace, shape: Shape) -> Schedule:
    """The arrivals that a replay of `trace` sends; equal inputs give equal schedules.

    Raises TraceError if no request is left, or if they lie too far apart for any replay.
    """
    start, end = _bounds_s(trace, shape)
    window = _inside(trace, shape, start, end)
    arrivals = [_scaled(a, start, shape) for a in _resample(window, shape, end)]
    if not arrivals:
        raise TraceError(_nothing_left(trace, shape))
    clipped = [_clipped(a, shape) for a in arrivals]
    duration_s = (end - start) * shape.time_scale
    if not math.isfinite(duration_s):
        duration_s = arrivals[-1].time_s
    refuse_endless(trace.path, duration_s, " --window t:A-B or idx:A-B replays a part of it")
    return Schedule(
        tuple(clipped),
        duration_s,
        sum(a.prompt_tokens != b.prompt_tokens for a, b in zip(arrivals, clipped, strict=True)),
        sum(a.output_tokens != b.output_tokens for a, b in zip(arrivals, clipped, strict=True)),
    )


def _bounds_s(trace: Trace, shape: Shape) -> tuple[float, float]:
    """From when to when the window lies; a window of rows ends where the next row comes.

    What lies beyond the trace is no calm of its own, and ends a second after the last request.
    """
    if shape.window_rows is None and shape.window_s is not None:
        start, until = shape.window_s
        return start, min(until, trace.arrivals[-1].time_s + 1.0)
    if shape.window_rows is None:
        return 0.0, math.inf
    first, end = shape.window_rows
    after = trace.arrivals[end].time_s if end < len(trace.arrivals) else math.inf
    return (trace.arrivals[first].time_s, after) if first < len(trace.arrivals) else (0.0, 0.0)


def _inside(trace: Trace, shape: Shape, start: float, end: float) -> Sequence[Arrival]:
    if shape.window_rows is not None:
        return trace.arrivals[slice(*shape.window_rows)]
    return [a for a in trace.arrivals if start <= a.time_s < end]


def _nothing_left(trace: Trace, shape: Shape) -> str:
    if shape.window_rows is not None:
        window = "window idx:{}-{}".format(*shape.window_rows)
        extent = f"has {len(trace.arrivals)} rows"
    else:
        window = "window t:{:g}-{:g}".format(*(shape.window_s or (0.0, math.inf)))
        extent = f"runs from 0 to {trace.arrivals[-1].time_s:.0f} s"
    return (
        f"no request of {trace.path} is left in the {window} at rate scale {shape.rate_scale:g}; "
        f"the trace {extent}"
    )


def _resample(window: Sequence[Arrival], shape: Shape, end: float) -> list[Arrival]:
    # Evenly spaced picks with a seeded phase: bursts stay as sharp as they are, where independent
    # draws would blur them. Further copies of a row come within a second of it, not at once.
    rng = random.Random(shape.seed)
    phase, scale = rng.random(), shape.rate_scale
    picked: list[Arrival] = []
    for i, arrival in enumerate(window):
        copies = math.floor((i + 1) * scale + phase) - math.floor(i * scale + phase)
        picked.extend([arrival] * (copies > 0))
        for _ in range(copies - 1):
            later = arrival.time_s + rng.random()
            picked.append(replace(arrival, time_s=later if later < end else arrival.time_s))
    return sorted(picked, key=lambda a: a.time_s)


def _scaled(arrival: Arrival, start: float, shape: Shape) -> Arrival:
    return Arrival(
        (arrival.time_s - start) * shape.time_scale,
        max(1, round(arrival.prompt_tokens * shape.length_scale)),
        max(1, round(arrival.output_tokens * shape.length_scale * shape.output_scale)),
    )


def _clipped(arrival: Arrival, shape: Shape) -> Arrival:
    return replace(
        arrival,
        prompt_tokens=min(arrival.prompt_tokens, shape.max_prompt or arrival.prompt_tokens),
        output_tokens=min(arrival.output_tokens, shape.max_output or arrival.output_tokens),
    )


@dataclass(frozen=True, slots=True)
class Burst:
    """The stretch of a schedule in which far more requests arrive than usual."""

    start_s: float
    end_s: float
    usual_rate: float  # median, requests/s
    peak_rate: float  # highest mean over 5 s, requests/s


def find_burst(arrivals: Sequence[Arrival], duration_s: float) -> Burst | None:
    """From the first to the last second in which the 5 s mean rate is over twice its median.

    By three standard deviations of chance arrivals over, and with a least number of arrivals;
    None where the schedule has no such stretch.
    """
    counts = rate_per_second(arrivals, duration_s)
    sums = _around(counts)
    means = sums / _around(np.ones_like(counts))
    usual = float(np.median(means))
    dense = np.flatnonzero(means > 2 * usual + 3 * math.sqrt(usual / 5))
    if not len(dense) or sums.max() < _LEAST_BURST:
        return None
    end_s = min(float(dense[-1]) + 1, duration_s)
    return Burst(float(dense[0]), end_s, usual, float(means.max()))


def _around(counts: Integers) -> Integers:
    """Sums over each second, the two before and the two after, where they are."""
    return np.convolve(counts, np.ones(5, dtype=np.int64))[2:-2]


def rate_per_second(arrivals: Sequence[Arrival], duration_s: float) -> Integers:
    """Arrivals in each second of the schedule."""
    num_seconds = max(1, math.ceil(max(duration_s, arrivals[-1].time_s)))
    seconds = np.array([a.time_s for a in arrivals]).astype(np.int64)
    return np.bincount(np.minimum(seconds, num_seconds - 1), minlength=num_seconds)
