"""What is measured of requests in the HTTP process, and everything for Prometheus."""

import time
from collections import Counter, deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client import Counter as PrometheusCounter

from morphserve.quantize.manifest import Variant
from morphserve.runtime.exposition import Server, expose
from morphserve.runtime.latency import Clock, FinishedRequest, Latency, LatencyWindow
from morphserve.runtime.messages import Snapshot

KEPT_REQUESTS = 50
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_REQUEST_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480)
_HISTOGRAMS = {
    "time_to_first_token_seconds": (
        "Request received to its first token from the engine.",
        _TTFT_S,
    ),
    "inter_token_latency_seconds": ("Between two steps that gave a request tokens.", _TOKEN_S),
    "request_time_per_output_token_seconds": (
        "Mean time per token after the first, of finished requests.",
        _TOKEN_S,
    ),
    "e2e_request_latency_seconds": ("Request received to its end.", _REQUEST_S),
    "request_queue_time_seconds": ("Submitted to the engine to first scheduled.", _TTFT_S),
    "request_prefill_time_seconds": ("First scheduled to first token.", _TTFT_S),
    "request_decode_time_seconds": ("First token to last.", _REQUEST_S),
}

# They would be a second series for each, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """One server's numbers. `read_snapshot` gives the engine's latest."""

    def __init__(
        self, read_snapshot: Callable[[], Snapshot], clock: Clock = time.monotonic
    ) -> None:
        self.clock = clock
        self.recent: deque[FinishedRequest] = deque(maxlen=KEPT_REQUESTS)
        self._read_snapshot = read_snapshot
        self._ttft_window, self._tpot_window, self._e2e_window = (
            LatencyWindow(clock) for _ in range(3)
        )
        self._registry = CollectorRegistry()
        self._seconds = {
            name: Histogram(f"morph:{name}", text, buckets=buckets, registry=self._registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._finished = PrometheusCounter(
            "morph:request_success",
            "Finished requests.",
            ["finished_reason"],
            registry=self._registry,
        )

    def latency(self) -> Latency:
        return Latency(
            self._ttft_window.percentiles(),
            self._tpot_window.percentiles(),
            self._e2e_window.percentiles(),
        )

    def exposition(self, server: Server) -> bytes:
        """Everything in Prometheus' text format."""
        return expose(self._registry, self._read_snapshot(), server)

    def observe_first_token(self, ttft_s: float) -> None:
        self._seconds["time_to_first_token_seconds"].observe(ttft_s)
        self._ttft_window.add(ttft_s)

    def observe_gap(self, gap_s: float) -> None:
        self._seconds["inter_token_latency_seconds"].observe(gap_s)

    def observe_finish(self, request: FinishedRequest) -> None:
        self.recent.append(request)
        self._finished.labels(request.finish_reason).inc()
        self._seconds["e2e_request_latency_seconds"].observe(request.e2e_s)
        self._e2e_window.add(request.e2e_s)
        if request.tpot_s is not None:
            self._seconds["request_time_per_output_token_seconds"].observe(request.tpot_s)
            self._tpot_window.add(request.tpot_s)

    def observe_phases(self, queue_s: float, prefill_s: float, decode_s: float) -> None:
        """Of a finished request that got a token."""
        self._seconds["request_queue_time_seconds"].observe(queue_s)
        self._seconds["request_prefill_time_seconds"].observe(prefill_s)
        self._seconds["request_decode_time_seconds"].observe(decode_s)


class RequestTimer:
    """Measures one request; a request with several prompts has one timer for each.

    `received` is when the request reached this process; all times are by the metrics' clock.
    """

    def __init__(self, metrics: Metrics, received: float) -> None:
        self._metrics = metrics
        self._received = received
        self._first = self._latest = 0.0  # when tokens came
        self._queued_s = 0.0
        self._num_tokens: Counter[Variant] = Counter()

    def tokens(
        self,
        count: int,
        at_s: float,
        precision: Variant = Variant.FULL,
        queued_s: float = 0.0,
    ) -> None:
        """`count` tokens came from the engine at `at_s`; `queued_s` is told with the first."""
        if count == 0:
            return
        if not self._num_tokens:
            self._first, self._queued_s = at_s, queued_s
            self._metrics.observe_first_token(at_s - self._received)
        else:
            self._metrics.observe_gap(at_s - self._latest)
        self._latest = at_s
        self._num_tokens[precision] += count

    def finish(self, reason: str, request_id: str = "", prompt_tokens: int = 0) -> None:
        """The request has ended, for one of OpenAI's reasons, or `abort` or `error`."""
        total, now = self._num_tokens.total(), self._metrics.clock()
        ttft_s, decode_s = self._first - self._received, self._latest - self._first
        self._metrics.observe_finish(
            FinishedRequest(
                id=request_id,
                time=time.time(),
                prompt_tokens=prompt_tokens,
                output_tokens=dict(self._num_tokens),
                finish_reason=reason,
                queued_s=self._queued_s if total else None,
                ttft_s=ttft_s if total else None,
                tpot_s=decode_s / (total - 1) if total > 1 else None,
                e2e_s=now - self._received,
            )
        )
        if total:
            prefill_s = max(0.0, ttft_s - self._queued_s)
            self._metrics.observe_phases(self._queued_s, prefill_s, decode_s)
