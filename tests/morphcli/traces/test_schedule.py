"""Cutting and scaling a trace keeps its shape and tells what it changed."""

import random

import pytest

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.traces.arrivals import Arrival, Trace, TraceError
from morphserve.morphcli.traces.schedule import (
    Shape,
    Window,
    find_burst,
    parse_window,
    rate_per_second,
    shape_trace,
)

STEADY = Trace("steady.csv", tuple(Arrival(i / 4, 100 + i, 40) for i in range(400)))


def test_a_window_starts_at_second_zero() -> None:
    schedule = shape_trace(STEADY, Shape(window_s=(10.0, 12.0)))
    assert [a.time_s for a in schedule.arrivals] == [i / 4 for i in range(8)]
    assert schedule.arrivals[0].prompt_tokens == 140
    assert schedule.duration_s == 2.0


def test_a_window_beyond_the_end_of_the_trace_ends_soon_after_its_last_request() -> None:
    schedule = shape_trace(STEADY, Shape(window_s=(90.0, 900.0)))  # the last is at 99.75 s
    assert (len(schedule.arrivals), schedule.duration_s) == (40, 10.75)


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 1.5, 3.0])
def test_rate_scale_keeps_the_shape(scale: float) -> None:
    schedule = shape_trace(STEADY, Shape(rate_scale=scale))
    counts = rate_per_second(schedule.arrivals, schedule.duration_s)
    assert abs(len(schedule.arrivals) - 400 * scale) <= 1
    assert abs(sum(counts[:50]) - 200 * scale) <= 3 * scale + 1


def test_equal_seeds_give_equal_schedules_and_others_do_not() -> None:
    schedules = [shape_trace(STEADY, Shape(rate_scale=0.3, seed=seed)) for seed in (1, 1, 2)]
    assert schedules[0] == schedules[1] != schedules[2]


def test_a_whole_copy_is_the_trace_itself() -> None:
    assert shape_trace(STEADY, Shape()).arrivals == STEADY.arrivals


def test_lengths_scale_before_they_are_clipped_and_clips_are_counted() -> None:
    trace = Trace("t.csv", (Arrival(0, 10, 10), Arrival(1, 30, 1)))
    schedule = shape_trace(trace, Shape(length_scale=0.5, max_prompt=8, max_output=4))
    assert [(a.prompt_tokens, a.output_tokens) for a in schedule.arrivals] == [(5, 4), (8, 1)]
    assert (schedule.clipped_prompts, schedule.clipped_outputs) == (1, 1)


def test_time_scale_squeezes_time() -> None:
    schedule = shape_trace(STEADY, Shape(window_s=(0.0, 10.0), time_scale=0.5))
    assert schedule.duration_s == 5.0
    assert schedule.arrivals[-1].time_s == 9.75 / 2


def test_an_empty_window_is_one_sentence() -> None:
    with pytest.raises(TraceError, match="the trace runs from 0 to 100 s"):
        shape_trace(STEADY, Shape(window_s=(200.0, 300.0)))


@pytest.mark.parametrize(
    "text",
    [
        *("10-20", "t:20-10", "t:a-b", "t:5", "t:-1-5", "t:0-inf"),
        *("idx:5", "idx:9-3", "idx:1.5-3", "idx:-1-3", "rows:1-2"),
    ],
)
def test_a_window_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--window"):
        parse_window(text)


def test_rows_of_a_window_are_told_with_their_end() -> None:
    with pytest.raises(ConfigError, match="B the first one after them, .* or idx:0-100"):
        parse_window("idx:0")


def test_a_window_is_parsed() -> None:
    assert parse_window("t:92-154.5") == Window(seconds=(92.0, 154.5))
    assert parse_window("idx:10-250") == Window(rows=(10, 250))


def test_a_window_of_rows_starts_at_its_first_and_ends_at_the_next() -> None:
    schedule = shape_trace(STEADY, Shape(window_rows=(40, 48)))
    assert schedule == shape_trace(STEADY, Shape(window_s=(10.0, 12.0)))
    last = shape_trace(STEADY, Shape(window_rows=(396, 1000)))
    assert len(last.arrivals) == 4 and last.duration_s == 0.75


def test_a_window_behind_the_last_row_is_one_sentence() -> None:
    with pytest.raises(TraceError, match="in the window idx:400-500 .* the trace has 400 rows"):
        shape_trace(STEADY, Shape(window_rows=(400, 500)))


def test_thinning_keeps_a_burst_as_sharp_as_it_is() -> None:
    calm = [Arrival(float(i), 1, 1) for i in range(60)]
    dense = [Arrival(20 + i / 100, 1, 1) for i in range(950)]
    trace = Trace("burst.csv", tuple(sorted([*calm, *dense], key=lambda a: a.time_s)))
    schedule = shape_trace(trace, Shape(rate_scale=1 / 4.75, seed=3))
    counts = rate_per_second(schedule.arrivals, schedule.duration_s)
    assert abs(len(schedule.arrivals) - 1010 / 4.75) <= 1
    assert all(abs(count - 101 / 4.75) <= 1 for count in counts[20:29])


def test_a_stamp_that_is_far_off_is_one_sentence() -> None:
    stamps = [0.0, *(1.7e9 + i for i in range(20))]
    trace = Trace("t.csv", tuple(Arrival(at, 1, 1) for at in stamps))
    for shape in (Shape(), Shape(window_s=(0.0, 1e12)), Shape(window_rows=(0, 5))):
        with pytest.raises(TraceError, match="t.csv runs over .* is a stamp wrong.* --window"):
            shape_trace(trace, shape)
    assert len(shape_trace(trace, Shape(window_rows=(1, 21))).arrivals) == 20


@pytest.mark.parametrize(
    "bad", [{"rate_scale": 0.0}, {"length_scale": -1.0}, {"max_prompt": 0}, {"time_scale": 0.0}]
)
def test_scales_must_be_above_zero(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Shape(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.1, 0.5, 2.0])
def test_chance_is_no_burst(rate: float) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        arrivals = [Arrival(0.0, 1, 1)]
        while arrivals[-1].time_s < 60:
            arrivals.append(Arrival(arrivals[-1].time_s + rng.expovariate(rate), 1, 1))
        assert find_burst(arrivals, 60.0) is None, seed


def test_the_burst_is_where_arrivals_are_far_denser_than_usual() -> None:
    calm = [Arrival(float(i), 1, 1) for i in range(60)]
    dense = [Arrival(20 + i / 10, 1, 1) for i in range(100)]
    arrivals = sorted([*calm, *dense], key=lambda a: a.time_s)
    burst = find_burst(arrivals, 60.0)
    assert burst is not None
    assert abs(burst.start_s - 20) <= 2 and abs(burst.end_s - 30) <= 2
    assert burst.usual_rate == 1 and burst.peak_rate == 11
    assert find_burst(calm, 60.0) is None
