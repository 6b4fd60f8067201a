"""Figures of a run, checked on runs small enough to count by hand."""

import pytest
from bench_runs import SLO, answered, make_run, state, unanswered

from morphserve.configs.schema import Slo
from morphserve.morphcli.bench.figures import Percentiles
from morphserve.morphcli.bench.summary import (
    mean_perplexity,
    meets,
    percentile,
    percentiles,
    show_s,
    show_slo,
    summarise,
    tokens_per_mix,
)
from morphserve.quantize.manifest import Rung, Variant

FULL, INT8, INT4 = Variant.FULL, Variant.INT8, Variant.INT4


@pytest.mark.parametrize(("q", "expected"), [(50, 2.0), (75, 3.0), (76, 4.0), (99, 4.0), (0, 1.0)])
def test_percentiles_are_by_nearest_rank(q: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], q) == expected


def test_an_unanswered_request_is_slower_than_all_others() -> None:
    assert percentiles([1.0, None, 2.0]) == Percentiles(p50=2.0, p95=None, p99=None)
    assert percentiles([]) == Percentiles(None, None, None)


def test_misses_are_counted_over_offered_requests() -> None:
    outcomes = [
        answered(0, ttft_s=0.5),
        answered(1, ttft_s=1.5),  # first token too late
        answered(2, ttft_s=0.5, tpot_s=0.2),  # too slow after it
        unanswered(3, status=503),
        unanswered(4, timed_out=True),
        unanswered(5),
    ]
    found = summarise(make_run("full", outcomes, []), SLO, burst_end_s=3.0)
    assert (found.offered, found.finished) == (6, 3)
    assert (found.refused, found.unfinished, found.failed) == (1, 1, 1)
    assert found.slo_misses == 5 and found.slo_miss_share == 5 / 6
    assert found.ttft_s == Percentiles(p50=1.5, p95=None, p99=None)
    assert found.tpot_s.p50 == pytest.approx(0.05) and found.tpot_s.p99 == pytest.approx(0.2)
    assert found.server is None and found.perplexity is None


def test_a_request_that_was_refused_and_ran_into_the_timeout_counts_once() -> None:
    outcomes = [answered(0, 0.1), unanswered(1, status=503, timed_out=True)]
    found = summarise(make_run("full", outcomes, []), SLO, burst_end_s=3.0)
    assert (found.refused, found.unfinished, found.failed) == (1, 0, 0)


def test_throughput_is_over_first_send_to_last_token() -> None:
    outcomes = [answered(0, ttft_s=0.5), answered(3, ttft_s=0.5)]  # the last token at 3 + 1 s
    found = summarise(make_run("full", outcomes, []), SLO, burst_end_s=3.0)
    assert found.duration_s == pytest.approx(4.0)
    assert found.output_tokens_per_s == pytest.approx(22 / 4)
    assert found.finished_per_s == found.goodput_per_s == pytest.approx(0.5)


def test_a_late_load_generator_and_wrong_lengths_are_faults() -> None:
    on_time, late = answered(0, 0.1), answered(1, 0.1)
    assert summarise(make_run("full", [on_time, late], []), SLO, 3.0).faults == []
    late.sent_s = late.intended_s + 0.2
    late.output_tokens = 3
    found = summarise(make_run("full", [on_time, late], []), SLO, 3.0)
    assert found.lag_p50_s == pytest.approx(0.001) and found.lag_max_s == pytest.approx(0.2)
    assert found.faults == [
        "requests left up to 200 ms late (P99)",
        "1 answers had another length than asked for",
    ]


def test_another_length_is_no_fault_where_the_server_could_not_be_told_one() -> None:
    short = answered(0, 0.1)
    short.output_tokens = 3
    run = make_run("server", [short], [])
    run.forces_length = False
    assert summarise(run, SLO, 3.0).faults == []


def test_failures_errors_and_missing_counts_are_faults_and_turning_away_is_none() -> None:
    silent = answered(5, 0.1)
    silent.output_tokens = 0
    outcomes = [
        answered(0, 0.1), unanswered(1), unanswered(2, status=400), unanswered(3, status=429),
        unanswered(4, status=503), silent, unanswered(6, status=200, timed_out=True),
    ]  # fmt: skip
    found = summarise(make_run("full", outcomes, []), SLO, 3.0)
    assert found.faults == [
        "1 requests failed without a whole answer",
        "1 requests were answered with HTTP 400",
        "1 answers did not tell their number of tokens",
    ]
    assert not meets(silent, SLO) and meets(outcomes[0], SLO)


def test_recovery_ends_with_what_the_burst_began_and_later_swaps_are_counted() -> None:
    def figures(*levels: int) -> tuple[float | None, int]:
        states = [state(at_s, level, 0) for at_s, level in enumerate(levels)]
        server = summarise(make_run("morph", [answered(0, 0.1)], states), SLO, 2.5).server
        assert server is not None
        return server.full_again_s, server.later_episodes

    assert figures(0, 0, 0, 0, 0, 0) == (None, 0)
    assert figures(0, 2, 2, 0, 0, 0) == (0.5, 0)
    assert figures(0, 2, 0, 0, 0, 0) == (0.0, 0)
    assert figures(0, 2, 2, 2, 0, 1, 0, 1, 0) == (1.5, 2)
    assert figures(0, 0, 0, 0, 1, 0) == (0.0, 1)
    assert figures(0, 2, 2, 0, 1, 1) == (None, 1)


def test_figures_of_the_server_are_differences_within_the_run() -> None:
    states = [state(0, 0, 100, 3), state(1, 2, 200, 3), state(2, 4, 300, 9), state(6, 0, 500, 9)]
    server = summarise(make_run("morph", [answered(0, 0.1)], states), SLO, 1.5).server
    assert server is not None
    assert server.preemptions == 6
    assert server.quantized_token_share == 0.5
    assert server.int4_layers_mean == (0 * 100 + 2 * 100 + 4 * 200) / 400
    assert (server.int4_layers_max, server.quantized_layers_at_end) == (4, 0)
    assert (server.kv_tokens_min, server.kv_tokens_max) == (160, 288)
    assert server.full_again_s == 4.5  # full precision is seen first at second 6


def test_layers_that_never_came_back_are_not_called_recovered() -> None:
    states = [state(0, 2, 100), state(1, 2, 200)]
    server = summarise(make_run("morph", [answered(0, 0.1)], states), SLO, 1.5).server
    assert server is not None
    assert server.full_again_s is None and server.quantized_layers_at_end == 2


def test_int8_layers_are_not_full_precision_and_not_int4() -> None:
    states = [state(0, 0, 0), state(1, 0, 100), state(2, 0, 300), state(3, 0, 400)]
    for sample, (at_int8, at_int4) in zip(states, [(0, 0), (4, 0), (3, 1), (1, 0)], strict=True):
        sample.ladder = [Rung(i, to) for to in (INT8, INT4) for i in range(4)]
        sample.layers = [INT4] * at_int4 + [INT8] * at_int8
        sample.layers += [FULL] * (4 - len(sample.layers))
    server = summarise(make_run("morph", [answered(0, 0.1)], states), SLO, 1.5).server
    assert server is not None
    assert (server.quantized_layers_max, server.int4_layers_max) == (4, 1)
    assert server.int4_layers_mean == 1 * 100 / 400
    assert server.quantized_layers_at_end == 1 and server.full_again_s is None
    assert tokens_per_mix(states) == {
        (FULL,) * 4: 100,
        (INT8,) * 4: 200,
        (INT4, INT8, INT8, INT8): 100,
    }


def test_a_layer_counts_as_int4_until_its_promotion_is_done() -> None:
    moving = state(0, 0, 0)
    moving.layers = [Variant.FULL, Variant.FULL, Variant.INT4, Variant.INT4]
    moving.swapping = {1: Variant.INT4, 2: Variant.FULL}
    assert moving.num_int4 == 2


def test_mean_perplexity_weighs_mixes_by_their_tokens() -> None:
    states = [state(0, 0, 0), state(1, 4, 100), state(2, 4, 400)]
    tokens = tokens_per_mix(states)
    full, int4 = (FULL,) * 4, (INT4,) * 4
    assert tokens == {full: 100, int4: 300}
    found = mean_perplexity(tokens, {full: 10.0, int4: 20.0})
    assert found == pytest.approx(10 ** (1 / 4) * 20 ** (3 / 4))
    assert mean_perplexity(tokens, {full: 10.0}) is None
    assert mean_perplexity({}, {full: 10.0}) is None


def test_targets_are_shown_as_they_are_read() -> None:
    assert show_slo(Slo(2.0, 0.2)) == "first token ≤ 2 s, per token ≤ 200 ms"
    assert show_slo(Slo(None, 1.5)) == "per token ≤ 1.5 s"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0123, "12.3 ms"), (0.9999, "1 s"), (1.234, "1.23 s"), (99.9, "100 s"), (1234.0, "1234 s")],
)
def test_seconds_are_shown_with_three_figures(seconds: float, shown: str) -> None:
    assert show_s(seconds) == shown
