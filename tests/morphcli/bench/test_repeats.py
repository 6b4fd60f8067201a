"""Repeats: figures together, confidence intervals, and the order of runs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from bench_runs import SLO, answered, make_run, state, unanswered
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as replaced

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.figures import PolicySummary, ServerFigures
from morphserve.morphcli.bench.repeats import (
    interval,
    invalid_loads,
    load_point,
    pooled,
    spread,
)
from morphserve.morphcli.bench.request import BenchRequest, jobs_of, main_rate, parse_rates
from morphserve.morphcli.bench.server import State
from morphserve.morphcli.bench.summary import Run, summarise
from morphserve.morphcli.traces.schedule import Shape
from morphserve.quantize.manifest import Variant


def two_runs() -> tuple[list[Run], list[PolicySummary]]:
    states = [state(0.0, 0, 0), state(1.0, 2, 10), state(2.0, 0, 30, preemptions=3)]
    runs = [
        make_run("morph", [answered(0, 0.1), answered(1, 0.2)], states),
        make_run("morph", [answered(0, 0.3), unanswered(1, 503)], states),
    ]
    return runs, [summarise(run, SLO, burst_end_s=1.0) for run in runs]


def test_the_interval_of_a_mean_is_students() -> None:
    # Mean 10, sample deviation 2 over three values, t(2) = 4.303: 10 ± 4.303 * 2 / sqrt(3).
    found = interval([8.0, 10.0, 12.0])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((10 - 4.9687, 10 + 4.9687), abs=1e-3)


def test_one_value_or_an_unknown_one_has_no_interval() -> None:
    assert interval([1.0]) is None
    assert interval([1.0, None, 1.0]) is None


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=40))
def test_an_interval_holds_the_mean_and_nothing_below_zero(values: list[float]) -> None:
    found = interval(values)
    assert found is not None
    mean = sum(values) / len(values)
    assert 0 <= found.low <= mean * (1 + 1e-9) and mean * (1 - 1e-9) <= found.high


def test_repeats_are_pooled_request_by_request() -> None:
    runs, each = two_runs()
    both = pooled(runs, each)
    assert (both.offered, both.finished, both.refused, both.slo_misses) == (4, 3, 1, 1)
    assert both.ttft_s.p50 == 0.2  # of 0.1, 0.2, 0.3 and never
    assert both.slo_attainment == 0.75
    assert both.duration_s == pytest.approx(sum(s.duration_s for s in each))
    assert both.server is not None and both.server.preemptions == 3  # per run
    assert pooled(runs[:1], each[:1]) == each[0]


def pooled_server(*runs: list[State]) -> ServerFigures:
    made = [make_run("morph", [answered(0, 0.1)], states) for states in runs]
    found = pooled(made, [summarise(run, SLO, burst_end_s=1.5) for run in made]).server
    assert found is not None
    return found


def test_a_repeat_that_never_left_full_precision_does_not_hide_that_others_came_back() -> None:
    never = [state(0, 0, 0), state(5, 0, 10)]
    back = [state(0, 0, 0), state(1, 2, 10), state(4, 0, 30)]
    stayed = [state(0, 0, 0), state(1, 2, 10), state(4, 2, 30)]
    assert pooled_server(never, back).full_again_s == 2.5
    assert pooled_server(never, never).full_again_s is None
    assert pooled_server(back, stayed).full_again_s is None


def test_counts_of_servers_are_means_per_run_and_shares_are_weighted_by_tokens() -> None:
    few = [state(0, 4, 0), state(1, 0, 100, preemptions=1)]
    many = [state(0, 0, 0), state(1, 0, 300, preemptions=4)]
    for sample in many:
        sample.generated_tokens = {Variant.FULL: sample.num_generated}
    found = pooled_server(few, many)
    assert found.preemptions == 2.5
    assert found.quantized_token_share == 50 / 400
    assert found.int4_layers_mean == 4 * 100 / 400


def test_an_interval_of_a_share_ends_at_all() -> None:
    found = interval([1.0, 0.8], most=1.0)
    assert found is not None and (found.low, found.high) == (0.0, 1.0)


def test_the_spread_tells_how_far_repeats_differ() -> None:
    _, each = two_runs()
    found = spread(each)
    assert found is not None and found.count == 2
    assert found.slo_miss_share is not None and found.slo_miss_share.low == 0
    assert found.ttft_p95_s is None  # one run had a request without an answer at that rank
    assert spread(each[:1]) is None


def request(**changes: object) -> BenchRequest:
    plain = BenchRequest(
        "demo", Path("t"), Shape(), ("full", "morph"), SLO, Path("o"), Path("b"), "9MiB"
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_a_single_comparison_keeps_the_order_that_was_asked_for() -> None:
    assert [job.policy for job in jobs_of(request())] == ["full", "morph"]


def test_each_repeat_has_all_runs_in_an_order_of_its_own() -> None:
    asked = request(repeat=20, rates=(1.0, 2.0))
    jobs = jobs_of(asked)
    blocks = [jobs[i : i + 4] for i in range(0, len(jobs), 4)]
    keys = {("full", 1.0), ("full", 2.0), ("morph", 1.0), ("morph", 2.0)}
    assert all({(j.policy, j.rate) for j in block} == keys for block in blocks)
    assert len({tuple((j.policy, j.rate) for j in block) for block in blocks}) > 5
    assert jobs == jobs_of(asked)


def test_a_sweep_tells_the_load_nearest_the_schedules_own_in_full() -> None:
    assert main_rate(parse_rates("0.5,1.1,4")) == 1.1
    runs, each = two_runs()
    point = load_point(pooled(runs, each), 2, schedule_s=4.0)
    assert (point.policy, point.rate, point.attainment, point.repeats) == ("morph", 1.0, 0.75, 2)


def test_the_load_offered_is_that_of_the_schedule_however_late_answers_end() -> None:
    at_once = make_run("morph", [answered(i, 0.1) for i in range(4)], [])
    late = make_run("full", [answered(i, 60.0) for i in range(4)], [])
    each = [summarise(replaced(run, rate=2.0), SLO, 1.0) for run in (at_once, late)]
    points = [load_point(summary, 1, schedule_s=4.0) for summary in each]
    assert [(point.rate, point.offered_per_s) for point in points] == [(2.0, 1.0), (2.0, 1.0)]


def test_a_load_whose_run_proves_nothing_says_so() -> None:
    broken = summarise(make_run("full", [answered(0, 0.1), unanswered(1)], []), SLO, 1.0)
    point = load_point(broken, 1, schedule_s=4.0)
    assert point.faults == broken.faults
    assert list(invalid_loads([point], main=2.0)) == [
        "full precision at 1 times the load proves nothing: "
        "1 requests failed without a whole answer."
    ]
    assert list(invalid_loads([point], main=1.0)) == []  # the verdict tells it


def test_a_run_tells_its_repeat_and_its_load() -> None:
    run = replaced(two_runs()[0][0], repeat=3, rate=0.5)
    found = summarise(run, SLO, burst_end_s=1.0)
    assert (found.repeat, found.rate) == (3, 0.5)
    assert pooled([run, run], [found, found]).rate == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeat": 0}, "--repeat must be at least 1"),
        ({"rates": (0.0, 1.0)}, "--rates must be above 0"),
        ({"rates": (1.0, 1.0)}, "name each load once"),
        ({"timeout_s": 0.0}, "--timeout must be a number of seconds above 0"),
        ({"timeout_s": math.inf}, "--timeout must be a number of seconds above 0"),
    ],
)
def test_senseless_numbers_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request(**changes)


def test_rates_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="write multiples of the load"):
        parse_rates("1,fast")
