"""Drawings hold what the figures and runs say, and stay light however much that is."""

import math
from xml.etree import ElementTree

import msgspec
import pytest
from bench_runs import SLO, answered, make_run, make_summary, state, unanswered
from bench_scenes import POLICIES, scene, scene_run
from matplotlib.figure import Figure

from morphserve.configs.schema import Slo
from morphserve.morphcli.bench.curves import attainment_figure
from morphserve.morphcli.bench.drawings import draw_all, median_runs, runs_shown
from morphserve.morphcli.bench.figures import PositionShare
from morphserve.morphcli.bench.frame import count_events, in_flight, make_frame
from morphserve.morphcli.bench.looks import looks
from morphserve.morphcli.bench.marks import distinct, spans, thin
from morphserve.morphcli.bench.overview import overview_figure, quality_loss, scatter_figure
from morphserve.morphcli.bench.precision import positions_figure
from morphserve.morphcli.bench.record import LoadPoint
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.bench.timeline import timeline_figure
from morphserve.morphcli.traces.schedule import Burst
from morphserve.profile.drawing import COLOURS, as_file
from morphserve.quantize.manifest import Rung, Variant

NAMES = {"overview", "quality-latency", "distributions", "tokens-by-precision"}
OVER_LOAD = {"attainment", "goodput", "first-tokens-over-load", "throughput"}


def words(figure: Figure) -> str:
    """Every text of a drawing."""
    texts = ElementTree.fromstring(as_file(figure, "svg")).itertext()
    return " | ".join(text.strip() for text in texts if text.strip())


def one_run(run: Run, burst: Burst | None = None, slo: Slo = SLO) -> str:
    return words(timeline_figure(run, make_frame([run], 5.0, slo, burst)))


def test_everything_that_was_measured_is_drawn() -> None:
    drawings = draw_all(*scene(repeats=2, rates=(0.5, 1.0, 2.0), seconds=20))
    names = {drawing.name for drawing in drawings}
    timelines = {f"timeline-{policy.replace(':', '-')}" for policy in POLICIES}
    assert names == NAMES | OVER_LOAD | timelines | {"tokens-by-place"}
    for drawing in drawings:
        assert ElementTree.fromstring(drawing.svg).tag.endswith("svg")
        assert drawing.alt and drawing.caption


def test_what_was_not_measured_is_left_out() -> None:
    run = make_run("server", [answered(i, 0.2) for i in range(3)], [])
    summary, schedule = make_summary([run])
    drawings = draw_all(summary, [run], schedule)
    assert {drawing.name for drawing in drawings} == {
        "overview",
        "distributions",
        "timeline-server",
    }
    assert "requests in flight" in words(drawings.timelines[0].figure)


def test_panels_of_a_timeline_tell_what_they_show() -> None:
    states = [state(0, 0, 0), state(1, 4, 10, preemptions=3), state(3, 0, 50, preemptions=3)]
    states[2].swaps = 8
    states[1].swapping = {3: "full"}  # type: ignore[dict-item]
    outcomes = [answered(0, 0.2), answered(1, 3.0), unanswered(2, 503), unanswered(3, 0, True)]
    told = one_run(make_run("morph", outcomes, states), Burst(1.0, 2.0, 1.0, 7.0))
    for text in ("requests offered per second", "burst", "running", "waiting", "refused (1)",
                 "KV cache, tokens", "capacity", "at full precision", "precision of each layer",
                 "INT4", "moving", "first token", "missed", "no answer (2)", "target 1 s",
                 "layer swaps per second", "8 in all", "preemptions per second", "3 in all",
                 "seconds since the start"):  # fmt: skip
        assert text in told


def test_a_calm_run_has_no_panels_of_events() -> None:
    told = one_run(make_run("full", [answered(0, 0.2)], [state(0, 0, 0), state(3, 0, 5)]))
    assert "swaps" not in told and "preemptions" not in told and "burst" not in told


def test_a_fast_target_and_faster_answers_are_in_the_axis() -> None:
    run = make_run("full", [answered(0, 0.004)], [state(0, 0, 0)])
    slo = Slo(ttft_s=0.005)
    assert "target 5 ms" in one_run(run, slo=slo)
    assert make_frame([run], 5.0, slo, None).fastest_s <= 0.004


def test_a_run_without_any_answer_is_drawn() -> None:
    run = make_run("full", [unanswered(i, timed_out=True) for i in range(3)], [state(0, 0, 0)])
    summary, schedule = make_summary([run])
    summary.curve = [LoadPoint("full", rate, rate, 0.0, 0.0, 0.0, None, None) for rate in (1, 2)]
    drawings = {drawing.name: drawing for drawing in draw_all(summary, [run], schedule)}
    assert "never" in words(drawings["overview"].figure)
    assert drawings.keys() >= OVER_LOAD


def test_all_policies_share_their_axes() -> None:
    calm = make_run("full", [answered(0, 0.2)], [state(0, 0, 0), state(3, 0, 5)])
    busy = make_run("morph", [answered(0, 8.0)], [state(0, 4, 0), state(40, 0, 5)])
    frame = make_frame([calm, busy], 5.0, SLO, None)
    limits = [
        [(axes.get_xlim(), axes.get_ylim()) for axes in timeline_figure(run, frame).axes]
        for run in (calm, busy)
    ]
    assert limits[0] == limits[1]
    assert frame.end_s == 40 and frame.slowest_s >= 8


def test_layers_stand_in_the_order_of_the_longest_ladder() -> None:
    bare, climbing = state(0, 0, 0), state(0, 0, 0)
    bare.ladder = []
    climbing.ladder = [Rung(layer, Variant.INT4) for layer in (2, 0)]
    runs = [make_run("full", [answered(0, 0.2)], [bare])]
    runs.append(make_run("morph", [answered(0, 0.2)], [climbing]))
    assert make_frame(runs, 5.0, SLO, None).layers == [2, 0, 1, 3]


def test_long_runs_tell_time_in_longer_units() -> None:
    frame = make_frame([make_run("full", [answered(0, 0.2)], [])], 4 * 3600.0, SLO, None)
    assert frame.unit == ("hours", 3600.0)
    assert frame.bin_s == 120


def test_the_repeat_in_the_middle_is_drawn() -> None:
    runs = [make_run("full", [answered(0, ttft), answered(1, 0.1)], []) for ttft in (3, 0.2, 0.3)]
    for number, run in enumerate(runs):
        run.repeat = number
    summary, schedule = make_summary(runs[:1])
    assert median_runs(summary, runs) == [runs[2]]
    assert draw_all(summary, runs, schedule).timelines[0].caption == (
        "full precision, repeat 3 of 3"
    )


def test_of_a_sweep_the_load_of_the_trace_is_drawn() -> None:
    runs = [scene_run("full", rate=rate, seconds=5) for rate in (0.5, 0.8, 2.0)]
    summary, _ = make_summary(runs[:1])
    settings = msgspec.structs.replace(summary.settings, rates=(0.5, 0.8, 2.0))
    summary.settings = settings
    assert runs_shown(summary, runs) == [runs[1]]


def test_a_point_of_a_run_that_proves_nothing_is_hollow() -> None:
    summary, runs, schedule = scene(("full", "morph"), rates=(0.5, 1.0), seconds=10)
    first, *others = summary.curve
    summary.curve = [msgspec.structs.replace(first, faults=["late"]), *others]
    (axes,) = attainment_figure(summary.curve).axes
    hollow = [x for line in axes.lines for x in line.get_xdata()
              if line.get_markerfacecolor() == COLOURS["card"]]  # fmt: skip
    assert hollow == [first.offered_per_s]
    assert "Hollow" in draw_all(summary, runs, schedule).load[0].caption


def test_places_in_an_answer_are_the_same_for_every_policy() -> None:
    summary, _, _ = scene(("full", "morph"), seconds=10)
    full, morph = summary.policies
    assert full.answers is not None and morph.answers is not None
    full.answers.positions[:] = [PositionShare(0, 9, 9, 0.0)]
    morph.answers.positions[:] = [PositionShare(0, 16, 9, 0.5), PositionShare(16, 30, 9, 0.5)]
    figure = positions_figure(summary.policies)
    assert figure is not None
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[0], [0, 1]]
    assert "16–63" in words(figure) and "16–29" not in words(figure)


def test_intervals_are_drawn_where_there_are_repeats() -> None:
    for repeats, whiskers in ((1, 0), (3, 5)):
        summary, _, _ = scene(("full",), repeats=repeats, seconds=20)
        figure = overview_figure(summary)
        lines = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "|"]
        assert len(lines) == whiskers


def test_a_scatter_needs_two_perplexities() -> None:
    summary, _, _ = scene(("full", "static:all", "morph"), seconds=20)
    figure = scatter_figure(summary)
    assert figure is not None
    assert "best: fast, no loss" in words(figure)
    for policy in summary.policies[1:]:
        policy.perplexity = None
    assert scatter_figure(summary) is None
    assert quality_loss(10.2, 10.0) == pytest.approx(2.0)


def test_a_point_that_was_never_answered_stands_at_the_edge() -> None:
    summary, _, _ = scene(("full", "morph"), seconds=20)
    summary.policies[0].ttft_s = type(summary.policies[0].ttft_s)(None, None, None)
    figure = scatter_figure(summary)
    assert figure is not None and "never: too few were answered" in words(figure)


def test_no_two_policies_look_alike() -> None:
    found = looks([*POLICIES, "static:2", "peer"])
    assert len(set(found.values())) == len(found)
    assert {look.colour for look in found.values()} <= COLOURS.keys()


def test_many_requests_make_no_heavy_drawing() -> None:
    run = scene_run("morph", seconds=600, per_second=8, num_layers=80)
    frame = make_frame([run], 600.0, SLO, None)
    assert len(run.outcomes) > 6000
    assert len(as_file(timeline_figure(run, frame), "svg")) < 600_000


def test_thinning_keeps_peaks_valleys_and_the_end() -> None:
    samples = [(i / 10, float(i % 7 == 3)) for i in range(100)]
    kept = thin(samples, 5.0)
    assert len(kept) < 12
    assert {value for _, value in kept} == {0.0, 1.0}
    assert kept[0] == samples[0] and kept[-1] == samples[-1]
    assert thin([(0, 5.0), (1, 5.0), (2, 7.0), (4, 7.0)], 0.1) == [(0, 5.0), (2, 7.0), (4, 7.0)]
    assert thin([], 1.0) == []


def test_spans_merge_what_is_equal_and_what_is_too_short_to_see() -> None:
    assert spans([(0, "a"), (1, "a"), (2, "b")], 3, 0) == [(0, 2, "a"), (2, 3, "b")]
    flicker = [(0, "a"), (5, "b"), (5.1, "a"), (8, "c")]
    assert spans(flicker, 9, 0.5) == [(0, 8, "a"), (8, 9, "c")]
    assert spans(flicker, 9, 0)[1] == (5, 5.1, "b")


def test_places_in_one_cell_are_one_dot() -> None:
    assert len(distinct([(0.0, 0.0), (0.1, 0.1), (5.0, 0.0)], (1.0, 1.0))) == 2


def test_events_and_requests_in_flight_are_counted() -> None:
    states = [state(0, 0, 0, 0), state(1.5, 0, 5, 4), state(2.5, 0, 5, 5)]
    run = make_run("full", [answered(0, 0.2), answered(0, 0.2), answered(4, 0.2)], states)
    events = count_events(run, 2.0)
    assert events.preemptions == {0: 4, 1: 1}
    assert events.offered == {0: 2, 2: 1}
    levels = in_flight(run.outcomes)
    assert max(level for _, level in levels) == 2 and levels[-1][1] == 0
    assert math.isclose(levels[-1][0], 4.7)
