"""How long requests took lately, and how fast tokens are made: what every view shows alike."""

import math
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from morphserve.quantize.manifest import Variant
from morphserve.runtime.messages import Snapshot

WINDOW_S = 60.0  # of the latency percentiles
RATES_S = 2.0  # over which tokens per second are counted
_MOST_VALUES = 8192  # of a window; further ones push out the oldest
_FRESH_S = 0.25  # watchers within this time share one sorting

Clock = Callable[[], float]


class Percentiles(msgspec.Struct, frozen=True):
    """Seconds."""

    p50: float
    p95: float
    p99: float


class Latency(msgspec.Struct, frozen=True):
    """Percentiles over the last minute; None where nothing was measured."""

    ttft_s: Percentiles | None = None  # request received to first token
    tpot_s: Percentiles | None = None  # per output token after the first, of finished requests
    e2e_s: Percentiles | None = None  # request received to last token, of finished requests


class FinishedRequest(msgspec.Struct, frozen=True):
    """What is told of a request that has ended: figures only, never its text."""

    id: str  # ours, as in the reply
    time: float  # when it ended, in seconds since the epoch
    prompt_tokens: int
    output_tokens: dict[Variant, int]  # by the lowest precision of the steps that made them
    finish_reason: str
    queued_s: float | None  # submitted to first scheduled; None without a token
    ttft_s: float | None
    tpot_s: float | None  # None with fewer than two tokens
    e2e_s: float


class Rates(msgspec.Struct, frozen=True):
    """Tokens per second."""

    prompt: float
    generation: float

    @classmethod
    def between(cls, before: Snapshot, now: Snapshot) -> "Rates":
        seconds = now.time - before.time
        if seconds <= 0:
            return cls(0.0, 0.0)
        # Counters of an engine that was started again begin at zero.
        prompt = max(0, now.prompt_tokens - before.prompt_tokens)
        generation = max(0, now.num_generated - before.num_generated)
        return cls(prompt / seconds, generation / seconds)


def recent_rates(snapshots: Sequence[Snapshot]) -> Rates:
    """Over the last seconds of `snapshots`, oldest first."""
    now = snapshots[-1]
    recent = (point for point in snapshots if now.time - point.time <= RATES_S)
    return Rates.between(next(recent, now), now)


class LatencyWindow:
    """Values of the last minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._values: deque[tuple[float, float]] = deque(maxlen=_MOST_VALUES)  # time, value
        self._told: Percentiles | None = None
        self._told_s = -math.inf

    def add(self, value: float) -> None:
        self._values.append((self._clock(), value))

    def percentiles(self) -> Percentiles | None:
        """Of values up to a quarter of a second ago."""
        now = self._clock()
        if now - self._told_s >= _FRESH_S:
            self._told, self._told_s = self._measure(now - WINDOW_S), now
        return self._told

    def _measure(self, oldest: float) -> Percentiles | None:
        while self._values and self._values[0][0] < oldest:
            self._values.popleft()
        if not self._values:
            return None
        ordered = sorted(value for _, value in self._values)
        return Percentiles(*(_nearest_rank(ordered, share) for share in (0.50, 0.95, 0.99)))


def _nearest_rank(ordered: list[float], share: float) -> float:
    # Nearest rank: interpolating between two requests would report a latency nobody saw.
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
