import pytest
from fake_engine import make_snapshot
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from morphserve.quantize.manifest import Variant
from morphserve.runtime.exposition import VLLM_NAMES, Server
from morphserve.runtime.latency import Latency, Percentiles
from morphserve.runtime.metrics import KEPT_REQUESTS, Metrics, RequestTimer

SERVER = Server("demo", {"load": 1.5}, {"queue_full": 3}, engine_restarts=2)
VLLM_LABELS = {"model_name": "demo", "engine": "0"}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def families(metrics: Metrics) -> dict[str, Metric]:
    text = metrics.exposition(SERVER).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(metrics: Metrics) -> dict[str, float]:
    """Ours, by name, with the values of labels in brackets."""
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in families(metrics).values()
        for sample in family.samples
    }


def served_one() -> Metrics:
    """A request that waited 0.2 s, had its first token after 0.5 s and four times two more."""
    clock = Clock()
    metrics = Metrics(make_snapshot, clock)
    timer = RequestTimer(metrics, received=99.5)
    timer.tokens(0, 99.75)
    timer.tokens(1, 100.0, Variant.FULL, queued_s=0.25)
    for i in range(1, 5):
        timer.tokens(2, 100 + i / 4, Variant.INT4)
    clock.now += 6
    timer.finish("length", "cmpl-1-0", prompt_tokens=12)
    return metrics


def test_a_requests_times_are_measured_from_its_receipt() -> None:
    metrics = served_one()
    ttft, tpot, e2e = (Percentiles(s, s, s) for s in (0.5, 0.125, 6.5))
    assert metrics.latency() == Latency(ttft, tpot, e2e)
    found = samples(metrics)
    assert found["morph:time_to_first_token_seconds_sum"] == 0.5
    assert found["morph:inter_token_latency_seconds_count"] == 4
    assert found["morph:inter_token_latency_seconds_sum"] == 1.0
    assert found["morph:request_time_per_output_token_seconds_sum"] == 0.125
    assert found["morph:e2e_request_latency_seconds_sum"] == 6.5
    assert found["morph:request_queue_time_seconds_sum"] == 0.25
    assert found["morph:request_prefill_time_seconds_sum"] == 0.25
    assert found["morph:request_decode_time_seconds_sum"] == 1.0
    assert found["morph:request_success_total[length]"] == 1


def test_a_finished_request_is_remembered_with_its_figures() -> None:
    (request,) = served_one().recent
    assert (request.id, request.prompt_tokens, request.finish_reason) == ("cmpl-1-0", 12, "length")
    assert request.output_tokens == {Variant.FULL: 1, Variant.INT4: 8}
    assert (request.queued_s, request.ttft_s, request.tpot_s) == (0.25, 0.5, 0.125)


def test_only_the_latest_requests_are_remembered() -> None:
    metrics = Metrics(make_snapshot, Clock())
    for i in range(KEPT_REQUESTS + 5):
        RequestTimer(metrics, received=99.0).finish("stop", str(i), 1)
    assert len(metrics.recent) == KEPT_REQUESTS and metrics.recent[0].id == "5"


def test_a_request_without_tokens_has_no_token_times() -> None:
    metrics = Metrics(make_snapshot, Clock())
    RequestTimer(metrics, received=99.0).finish("abort", "cmpl-2-0", 3)
    assert metrics.latency() == Latency(None, None, Percentiles(1.0, 1.0, 1.0))
    assert metrics.recent[0].ttft_s is None and metrics.recent[0].queued_s is None
    found = samples(metrics)
    assert found["morph:request_success_total[abort]"] == 1
    assert found["morph:request_queue_time_seconds_count"] == 0


def test_the_engines_snapshot_is_read_when_asked() -> None:
    snapshot = make_snapshot(running=7, blocks_used=30, blocks_capacity=60, demand=50)
    metrics = Metrics(lambda: snapshot)
    found = samples(metrics)
    assert found["morph:num_requests_running"] == 7
    assert found["morph:kv_cache_usage_perc"] == 0.5
    assert found["morph:pressure"] == 50 / 40
    assert found["morph:num_preemptions_total"] == 0
    assert found["morph:layers[full]"] == 3 and found["morph:layers[int4]"] == 1
    assert found["morph:prefix_cache_hits_total"] == 50
    assert found["morph:predicted_step_seconds"] == 0.009
    snapshot = make_snapshot(running=8, predicted_step_s=None)
    assert samples(metrics)["morph:num_requests_running"] == 8
    assert "morph:predicted_step_seconds" not in samples(metrics)


def test_the_servers_own_figures_are_told() -> None:
    found = samples(Metrics(make_snapshot))
    assert found["morph:startup_seconds[load]"] == 1.5
    assert found["morph:admission_rejections_total[queue_full]"] == 3
    assert found["morph:engine_restarts_total"] == 2


def test_vllms_names_tell_the_same_recording() -> None:
    found = families(served_one())
    for ours, theirs in VLLM_NAMES.items():
        for name in theirs:
            family = found[f"vllm:{name}"]
            assert family.type == found[f"morph:{ours}"].type
            assert all(VLLM_LABELS.items() <= s.labels.items() for s in family.samples)
    ours, theirs = (
        found["morph:request_decode_time_seconds"],
        found["vllm:request_decode_time_seconds"],
    )
    assert [(s.labels.get("le"), s.value) for s in ours.samples] == [
        (s.labels.get("le"), s.value) for s in theirs.samples
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vllm:num_requests_running", "gauge"),
        ("vllm:num_requests_waiting", "gauge"),
        ("vllm:kv_cache_usage_perc", "gauge"),
        ("vllm:gpu_cache_usage_perc", "gauge"),
        ("vllm:cache_config_info", "gauge"),
        ("vllm:num_preemptions", "counter"),
        ("vllm:prompt_tokens", "counter"),
        ("vllm:generation_tokens", "counter"),
        ("vllm:request_success", "counter"),
        ("vllm:prefix_cache_queries", "counter"),
        ("vllm:prefix_cache_hits", "counter"),
        ("vllm:time_to_first_token_seconds", "histogram"),
        ("vllm:inter_token_latency_seconds", "histogram"),
        ("vllm:request_time_per_output_token_seconds", "histogram"),
        ("vllm:e2e_request_latency_seconds", "histogram"),
        ("vllm:request_queue_time_seconds", "histogram"),
        ("vllm:request_prefill_time_seconds", "histogram"),
        ("vllm:request_decode_time_seconds", "histogram"),
    ],
)
def test_a_dashboard_made_for_vllm_finds(name: str, kind: str) -> None:
    assert families(served_one())[name].type == kind


def test_vllms_generated_tokens_are_those_of_all_precisions() -> None:
    tokens = {Variant.FULL: 5, Variant.INT4: 7}
    found = families(Metrics(lambda: make_snapshot(generated_tokens=tokens)))
    (theirs,) = found["vllm:generation_tokens"].samples
    assert (theirs.name, theirs.labels) == ("vllm:generation_tokens_total", VLLM_LABELS)
    assert theirs.value == 12


def test_settings_are_labels_and_creation_times_are_left_out() -> None:
    text = Metrics(make_snapshot).exposition(SERVER).decode()
    labels = 'block_size="16",num_gpu_blocks="40",policy="balanced"'
    assert f"morph:cache_config_info{{{labels}}} 1.0" in text
    assert "_created" not in text


def test_a_models_name_cannot_break_the_format() -> None:
    server = Server('a"\n\\b')
    text = Metrics(make_snapshot).exposition(server).decode()
    (sample,) = next(
        f for f in text_string_to_metric_families(text) if f.name == "vllm:num_requests_running"
    ).samples
    assert sample.labels["model_name"] == server.model
