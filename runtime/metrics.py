"""What is measured of requests in the HTTP process, and all numbers for Prometheus."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from morphserve.quantize.manifest import Variant
from morphserve.runtime.messages import Snapshot

WINDOW_S = 60.0  # of the latency percentiles
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_REQUEST_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480)

# They would be a second series for each, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

Clock = Callable[[], float]


class Percentiles(msgspec.Struct, frozen=True):
    """Seconds."""

    p50: float
    p95: float
    p99: float


class Latency(msgspec.Struct, frozen=True):
    """Percentiles over the last minute; None where nothing was measured."""

    ttft_s: Percentiles | None  # request received to first token
    tpot_s: Percentiles | None  # per output token after the first, of finished requests


class LatencyWindow:
    """Values of the last minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._values: deque[tuple[float, float]] = deque()  # time, value

    def add(self, value: float) -> None:
        self._values.append((self._clock(), value))
        self._forget()

    def percentiles(self) -> Percentiles | None:
        self._forget()
        if not self._values:
            return None
        ordered = sorted(value for _, value in self._values)
        return Percentiles(*(_nearest_rank(ordered, share) for share in (0.50, 0.95, 0.99)))

    def _forget(self) -> None:
        oldest = self._clock() - WINDOW_S
        while self._values and self._values[0][0] < oldest:
            self._values.popleft()


def _nearest_rank(ordered: list[float], share: float) -> float:
    # Nearest rank: interpolating between two requests would report a latency nobody saw.
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Metrics:
    """One server's numbers. `read_snapshot` gives the engine's latest."""

    def __init__(
        self, read_snapshot: Callable[[], Snapshot], clock: Clock = time.monotonic
    ) -> None:
        self.clock = clock
        self._ttft_window = LatencyWindow(clock)
        self._tpot_window = LatencyWindow(clock)
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(read_snapshot))
        self._ttft = Histogram(
            "morph:time_to_first_token_seconds",
            "Request received to first token.",
            buckets=_TTFT_S,
            registry=registry,
        )
        self._itl = Histogram(
            "morph:inter_token_latency_seconds",
            "Between two steps that gave a request tokens.",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self._tpot = Histogram(
            "morph:request_time_per_output_token_seconds",
            "Mean time per token after the first, of finished requests.",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self._e2e = Histogram(
            "morph:e2e_request_latency_seconds",
            "Request received to last token.",
            buckets=_REQUEST_S,
            registry=registry,
        )
        self._finished = Counter(
            "morph:request_success",
            "Finished requests.",
            ["finished_reason"],
            registry=registry,
        )

    def register(self, collector: Collector) -> None:
        """Adds numbers that somebody else keeps."""
        self._registry.register(collector)

    def latency(self) -> Latency:
        return Latency(self._ttft_window.percentiles(), self._tpot_window.percentiles())

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def observe_first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)
        self._ttft_window.add(ttft_s)

    def observe_gap(self, gap_s: float) -> None:
        self._itl.observe(gap_s)

    def observe_finish(self, reason: str, e2e_s: float, tpot_s: float | None) -> None:
        self._finished.labels(reason).inc()
        self._e2e.observe(e2e_s)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)
            self._tpot_window.add(tpot_s)


class RequestTimer:
    """Measures one request; a request with several prompts has one timer for each.

    `received` is when the request reached this process, by the metrics' clock.
    """

    def __init__(self, metrics: Metrics, received: float) -> None:
        self._metrics = metrics
        self._received = received
        self._first = self._latest = 0.0  # when tokens came
        self._num_tokens = 0

    def tokens(self, count: int) -> None:
        """`count` tokens have arrived."""
        if count == 0:
            return
        now = self._metrics.clock()
        if self._num_tokens == 0:
            self._first = now
            self._metrics.observe_first_token(now - self._received)
        else:
            self._metrics.observe_gap(now - self._latest)
        self._latest = now
        self._num_tokens += count

    def finish(self, reason: str) -> None:
        tpot_s = None
        if self._num_tokens > 1:
            tpot_s = (self._latest - self._first) / (self._num_tokens - 1)
        self._metrics.observe_finish(reason, self._metrics.clock() - self._received, tpot_s)


class _EngineCollector(Collector):
    """The engine's latest snapshot, read when Prometheus asks."""

    def __init__(self, read_snapshot: Callable[[], Snapshot]) -> None:
        self._read_snapshot = read_snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._read_snapshot()
        for name, text, value in _gauges(snapshot):
            yield GaugeMetricFamily(f"morph:{name}", text, value=value)
        for name, text, value in _counters(snapshot):
            yield CounterMetricFamily(f"morph:{name}", text, value=value)
        layers = GaugeMetricFamily("morph:layers", "Layers by precision.", labels=["precision"])
        for precision in Variant:
            layers.add_metric([precision.value], snapshot.layers.count(precision))
        yield layers
        tokens = CounterMetricFamily(
            "morph:generation_tokens",
            "Tokens generated, by the lowest precision of a layer in their step.",
            labels=["precision"],
        )
        for precision in Variant:
            tokens.add_metric([precision.value], snapshot.generated_tokens.get(precision, 0))
        yield tokens
        config = {"block_size": str(snapshot.block_tokens), "policy": snapshot.policy}
        info = GaugeMetricFamily("morph:cache_config_info", "Settings.", labels=list(config))
        info.add_metric(list(config.values()), 1)
        yield info


def _gauges(now: Snapshot) -> list[tuple[str, str, float]]:
    return [
        ("num_requests_running", "Requests in the batch.", now.running),
        ("num_requests_waiting", "Requests in the queue.", now.waiting),
        ("oldest_wait_seconds", "Age of the oldest request in the queue.", now.oldest_wait_s),
        ("kv_cache_usage_perc", "Used share of KV blocks, 0 to 1.", _usage(now)),
        ("kv_blocks_used", "KV blocks in use.", now.blocks_used),
        ("kv_blocks_capacity", "KV blocks there are now.", now.blocks_capacity),
        ("kv_blocks_capacity_full", "KV blocks at full precision.", now.blocks_full),
        ("kv_blocks_capacity_max", "KV blocks at the deepest rung.", now.blocks_max),
        ("kv_blocks_demand", "KV blocks wanted over the horizon.", now.demand),
        # Judged against full precision: comparable between servers however far each has morphed.
        ("pressure", "Wanted KV blocks over capacity at full precision.", _pressure(now)),
        ("rung", "Steps of demotion that are taken or under way.", now.rung),
        ("target_rung", "Steps of demotion that are wanted.", now.target_rung),
        ("step_seconds", "Duration of the latest step.", now.step_s),
    ]


def _counters(now: Snapshot) -> list[tuple[str, str, float]]:
    return [
        ("num_preemptions", "Requests preempted.", now.preemptions),
        ("swaps", "Layer swaps done.", now.swaps),
        ("steps", "Steps done.", now.steps),
        ("prompt_tokens", "Prompt tokens computed.", now.prompt_tokens),
    ]


def _usage(now: Snapshot) -> float:
    return now.blocks_used / now.blocks_capacity if now.blocks_capacity else 0.0


def _pressure(now: Snapshot) -> float:
    return now.demand / now.blocks_full if now.blocks_full else 0.0
