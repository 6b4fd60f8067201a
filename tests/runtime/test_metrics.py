from fake_engine import make_snapshot
from prometheus_client.parser import text_string_to_metric_families

from morphserve.runtime.metrics import Latency, LatencyWindow, Metrics, Percentiles, RequestTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def samples(metrics: Metrics) -> dict[str, float]:
    """By name, with the values of labels in brackets."""
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def test_percentiles_are_latencies_that_somebody_saw() -> None:
    clock = Clock()
    window = LatencyWindow(clock)
    assert window.percentiles() is None
    for value in range(1, 101):
        window.add(float(value))
    assert window.percentiles() == Percentiles(50.0, 95.0, 99.0)


def test_the_window_forgets_after_a_minute() -> None:
    clock = Clock()
    window = LatencyWindow(clock)
    window.add(9.0)
    clock.now += 40
    window.add(1.0)
    assert window.percentiles() == Percentiles(1.0, 9.0, 9.0)
    clock.now += 21
    assert window.percentiles() == Percentiles(1.0, 1.0, 1.0)
    clock.now += 60
    assert window.percentiles() is None


def test_a_requests_times_are_measured_from_its_receipt() -> None:
    clock = Clock()
    metrics = Metrics(make_snapshot, clock)
    timer = RequestTimer(metrics, received=99.5)
    timer.tokens(0)
    timer.tokens(1)
    for _ in range(4):
        clock.now += 0.25
        timer.tokens(2)
    clock.now += 5
    timer.finish("length")
    assert metrics.latency() == Latency(
        Percentiles(0.5, 0.5, 0.5), Percentiles(0.125, 0.125, 0.125)
    )
    found = samples(metrics)
    assert found["morph:time_to_first_token_seconds_sum"] == 0.5
    assert found["morph:inter_token_latency_seconds_count"] == 4
    assert found["morph:inter_token_latency_seconds_sum"] == 1.0
    assert found["morph:request_time_per_output_token_seconds_sum"] == 0.125
    assert found["morph:e2e_request_latency_seconds_sum"] == 6.5
    assert found["morph:request_success_total[length]"] == 1


def test_a_request_without_tokens_has_no_token_times() -> None:
    metrics = Metrics(make_snapshot, Clock())
    RequestTimer(metrics, received=99.0).finish("abort")
    assert metrics.latency() == Latency(None, None)
    assert samples(metrics)["morph:request_success_total[abort]"] == 1


def test_the_engines_snapshot_is_read_when_asked() -> None:
    snapshot = make_snapshot(running=7, blocks_used=30, blocks_capacity=60, demand=50)
    metrics = Metrics(lambda: snapshot)
    found = samples(metrics)
    assert found["morph:num_requests_running"] == 7
    assert found["morph:kv_cache_usage_perc"] == 0.5
    assert found["morph:pressure"] == 50 / 40
    assert found["morph:num_preemptions_total"] == 0
    assert found["morph:layers[full]"] == 3 and found["morph:layers[int4]"] == 1
    snapshot = make_snapshot(running=8)
    assert samples(metrics)["morph:num_requests_running"] == 8


def test_settings_are_labels_and_creation_times_are_left_out() -> None:
    text = Metrics(make_snapshot).exposition().decode()
    assert 'morph:cache_config_info{block_size="16",policy="balanced"} 1.0' in text
    assert "_created" not in text
