"""All numbers in Prometheus' text format, under our names and under vLLM's."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from morphserve.quantize.manifest import Variant
from morphserve.runtime.messages import Snapshot

# Families whose meaning is vLLM's: dashboards and routers made for it find them by its names too.
VLLM_NAMES = {
    name: (name,)
    for name in (
        *("num_requests_running", "num_requests_waiting", "num_preemptions"),
        *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds"),
        *("request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_prefill_time_seconds"),
        *("request_decode_time_seconds", "request_success", "cache_config_info"),
    )
} | {"kv_cache_usage_perc": ("kv_cache_usage_perc", "gpu_cache_usage_perc")}  # once and now
_PRECISION = "precision"  # a label that vLLM's families do not have


@dataclass(frozen=True, slots=True)
class Server:
    """What the HTTP process knows of itself beside its requests' times."""

    model: str = ""
    startup_s: Mapping[str, float] = field(default_factory=dict)  # seconds per phase
    refused: Mapping[str, int] = field(default_factory=dict)  # requests by reason
    engine_restarts: int = 0
    loop_stalls: int = 0  # times that the HTTP process stood still


def expose(requests: Collector, snapshot: Snapshot, server: Server) -> bytes:
    """`requests` are the families that are measured as they happen."""
    families = [*requests.collect(), *_engine(snapshot), *_server(server)]
    return generate_latest(_Families(families, server))


class _Families(Collector):
    """Every family, and again under vLLM's names: one recording, two names."""

    def __init__(self, families: Iterable[Metric], server: Server) -> None:
        self._families = list(families)
        self._labels = {"model_name": server.model, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        yield from self._families
        for family in self._families:
            for name in VLLM_NAMES.get(family.name.removeprefix("morph:"), ()):
                yield self._renamed(family, f"vllm:{name}")

    def _renamed(self, family: Metric, name: str) -> Metric:
        renamed = Metric(name, family.documentation, family.type)
        renamed.samples = [
            sample._replace(
                name=name + sample.name.removeprefix(family.name),
                labels=self._labels | sample.labels,
            )
            for sample in _without_precision(family.samples)
        ]
        return renamed


def _without_precision(samples: list[Sample]) -> list[Sample]:
    """Samples that differ in precision only, added up."""
    if not samples or _PRECISION not in samples[0].labels:
        return samples
    return [samples[0]._replace(labels={}, value=sum(sample.value for sample in samples))]


def _engine(now: Snapshot) -> Iterator[Metric]:
    for name, text, value in _gauges(now):
        yield GaugeMetricFamily(f"morph:{name}", text, value=value)
    for name, text, value in _counters(now):
        yield CounterMetricFamily(f"morph:{name}", text, value=value)
    layers = GaugeMetricFamily("morph:layers", "Layers by precision.", labels=[_PRECISION])
    tokens = CounterMetricFamily(
        "morph:generation_tokens",
        "Tokens generated, by the lowest precision of a layer in their step.",
        labels=[_PRECISION],
    )
    for precision in Variant:
        layers.add_metric([precision.value], now.layers.count(precision))
        tokens.add_metric([precision.value], now.generated_tokens.get(precision, 0))
    yield layers
    yield tokens
    config = {
        "block_size": str(now.block_tokens),
        "num_gpu_blocks": str(now.blocks_full),  # at full precision; kv_blocks_capacity has today's
        "policy": now.policy,
    }
    info = GaugeMetricFamily("morph:cache_config_info", "Settings.", labels=list(config))
    info.add_metric(list(config.values()), 1)
    yield info


def _server(server: Server) -> Iterator[Metric]:
    startup = GaugeMetricFamily(
        "morph:startup_seconds", "Time that each phase of the start took.", labels=["phase"]
    )
    for phase, seconds in server.startup_s.items():
        startup.add_metric([phase], seconds)
    yield startup
    refused = CounterMetricFamily(
        "morph:admission_rejections", "Requests that were not taken.", labels=["reason"]
    )
    for reason, count in server.refused.items():
        refused.add_metric([reason], count)
    yield refused
    yield CounterMetricFamily(
        "morph:event_loop_stalls",
        "Times the HTTP process stood still for seconds.",
        value=server.loop_stalls,
    )
    yield CounterMetricFamily(
        "morph:engine_restarts",
        "Times the engine was started again.",
        value=server.engine_restarts,
    )


def _gauges(now: Snapshot) -> Iterator[tuple[str, str, float]]:
    yield "num_requests_running", "Requests in the batch.", now.running
    yield "num_requests_waiting", "Requests in the queue.", now.waiting
    yield "num_requests_held", "Requests that wait for a higher precision.", now.held
    yield "int4_token_share", "Of the latest tokens, those of INT4 steps.", now.int4_token_share
    yield "oldest_wait_seconds", "Age of the oldest request in the queue.", now.oldest_wait_s
    yield "kv_cache_usage_perc", "Used share of KV blocks, 0 to 1.", _usage(now)
    yield "kv_blocks_used", "KV blocks in use.", now.blocks_used
    yield "kv_blocks_cached", "KV blocks kept for the prefix cache alone.", now.blocks_cached
    yield "kv_blocks_capacity", "KV blocks there are now.", now.blocks_capacity
    yield "kv_blocks_capacity_full", "KV blocks at full precision.", now.blocks_full
    yield "kv_blocks_capacity_max", "KV blocks at the deepest rung.", now.blocks_max
    yield "kv_blocks_demand", "KV blocks wanted over the horizon.", now.demand
    # Judged against full precision: comparable between servers however far each has morphed.
    yield "pressure", "Wanted KV blocks over capacity at full precision.", _pressure(now)
    yield "rung", "Steps of demotion that are taken or under way.", now.rung
    yield "target_rung", "Steps of demotion that are wanted.", now.target_rung
    yield "swaps_in_flight", "Layer swaps under way.", len(now.swapping)
    yield "step_seconds", "Duration of the latest step.", now.step_s
    if now.predicted_step_s is not None:
        text = "Duration of the latest step as the cost model has it."
        yield "predicted_step_seconds", text, now.predicted_step_s


def _counters(now: Snapshot) -> Iterator[tuple[str, str, float]]:
    yield "num_preemptions", "Requests preempted.", now.preemptions
    yield "swaps", "Layer swaps done.", now.swaps
    yield "steps", "Steps done.", now.steps
    yield "prompt_tokens", "Prompt tokens computed.", now.prompt_tokens
    queries = "Prompt tokens looked up in the prefix cache."
    yield "prefix_cache_queries", queries, now.prefix_queries
    yield "prefix_cache_hits", "Prompt tokens found in the prefix cache.", now.prefix_hits


def _usage(now: Snapshot) -> float:
    return now.blocks_used / now.blocks_capacity if now.blocks_capacity else 0.0


def _pressure(now: Snapshot) -> float:
    return now.demand / now.blocks_full if now.blocks_full else 0.0
