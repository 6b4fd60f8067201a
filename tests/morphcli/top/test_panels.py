"""What the live view says, read as text: colour only repeats it."""

import pytest
from fake_state import make_state
from rich.text import Text

from morphserve.morphcli.top import panels
from morphserve.morphcli.top.chart import kv_chart, sparkline
from morphserve.morphcli.top.history import KEPT_S, POINT_S, History, Point
from morphserve.quantize.manifest import Rung, Variant
from morphserve.runtime.server.state import State


def points(*sizes: tuple[int, int]) -> list[Point]:
    return [Point(float(i), used, capacity, 0.0, 0.0) for i, (used, capacity) in enumerate(sizes)]


def lines(text: Text) -> list[str]:
    return [line.rstrip() for line in text.plain.splitlines()]


def many_layers(count: int) -> State:
    variants = [Variant.INT4 if i % 2 else Variant.FULL for i in range(count)]
    ladder = [Rung(i, Variant.INT4) for i in reversed(range(count))]
    memory = make_state().memory
    images = {variant: [1000] * count for variant in (Variant.FULL, Variant.INT4)}
    return make_state(
        layers=variants,
        swapping={},
        ladder=ladder,
        memory=type(memory)(*(getattr(memory, f) for f in memory.__struct_fields__[:-1]), images),
    )


def test_every_state_of_a_layer_has_a_glyph_of_its_own() -> None:
    glyphs = [glyph for glyph, _ in panels.LAYERS.values()]
    assert len(set(glyphs)) == 5


def test_layers_stand_in_the_ladders_order_or_the_models() -> None:
    state = make_state(
        layers=[Variant.FULL, Variant.INT4, Variant.INT8, Variant.INT4],
        swapping={0: Variant.INT4, 3: Variant.FULL},
    )
    by_ladder, legend = lines(panels.layer_map(state, True, 80))
    assert by_ladder == "layers, least important first ░ ▓ ▼ ▲"
    assert lines(panels.layer_map(state, False, 80))[0] == "layers, in the model's order ▼ ░ ▓ ▲"
    assert legend == "█ full 0  ▓ int8 1  ░ int4 1  ▼ demoting 1  ▲ promoting 1"


def test_layers_that_are_never_demoted_come_last() -> None:
    state = make_state(ladder=[Rung(3, Variant.INT4)], swapping={}, layers=[Variant.FULL] * 4)
    assert lines(panels.layer_map(state, True, 80))[0].endswith("█ █ █ █")


@pytest.mark.parametrize("width", [40, 78, 158])
def test_a_deep_model_takes_more_lines(width: int) -> None:
    shown = panels.layer_map(many_layers(126), True, width)
    assert max(map(len, shown.plain.splitlines()[:-1])) <= width
    assert sum(shown.plain.partition("█ full")[0].count(glyph) for glyph in "█░") == 126


def test_growth_of_the_cache_shows_over_time() -> None:
    chart = kv_chart(points((10, 40), (40, 40), (50, 60), (80, 80), (5, 40)), 80, 40, 20, 4)
    assert lines(chart) == [
        " 80┤   █",
        "   │  ▄█",
        " 40┤─█████─"[:3] + "┤─███─",
        "   │▄███▂",
    ]


def test_a_sparkline_ends_at_now() -> None:
    assert sparkline([1.0, 2.0, 4.0], 5) == "  ▂▄█"
    assert sparkline([0.0, 0.0], 2) == "  "
    assert sparkline([], 3) == "   "


def test_a_step_is_shown_beside_its_prediction() -> None:
    usual = panels.header(make_state(step_s=0.0079, predicted_step_s=0.0076), "", 100)
    assert "step 7.9 ms (predicted 7.6)" in usual.plain
    slow = panels.header(make_state(step_s=0.021, predicted_step_s=0.0076), "", 100)
    assert len(slow.spans) > len(usual.spans)  # and in another colour
    assert "step" not in panels.header(make_state(predicted_step_s=None), "", 100).plain


def test_latency_that_misses_its_objective_is_marked() -> None:
    _, ttft, tpot, _ = lines(panels.latency(make_state(), 60))
    assert ttft.split() == ["TTFT", "≤100ms", "20ms", "500ms!", "1250ms!"]
    assert tpot.split() == ["TPOT", "≤50ms", "–", "–", "–"]


def test_queue_refusals_and_rates_are_shown() -> None:
    text = panels.traffic(make_state(running=2, preemptions=7), [], 60).plain
    assert "2 running  3 waiting (oldest 0.2 s)" in text
    assert "3 refused  7 preempted  prefix 25%  queue_full 3" in text
    assert "output tok/s   340" in text and "prompt tok/s   120" in text


def test_the_parts_of_memory_are_those_of_the_budget() -> None:
    state = make_state()
    parts = {name: size for name, size, _, _ in panels.memory_parts(state)}
    assert (parts["full"], parts["int4"]) == (300_000, 25_000)
    block = state.memory.page * 4
    assert parts["KV used"] == 30 * block and parts["KV cached"] == 6 * block
    assert parts["KV free"] == 24 * block
    _, bar = lines(panels.memory(state, 60))
    assert len(bar) == 60 and len(set(bar)) == 7


def test_a_request_shows_how_much_of_it_was_lowered() -> None:
    _, row = lines(panels.requests(make_state().requests, 120, 5))
    assert row.split()[1:] == "120 40 25% 10ms 50ms 20ms 900ms length cmpl-abc-0".split()


def test_the_history_keeps_what_the_chart_shows() -> None:
    history = History()
    for i in range(5000):
        history.add(make_state(time=i * 0.25))
    assert len(history.points) == KEPT_S / POINT_S
    assert history.points[-1].time - history.points[-2].time == POINT_S


@pytest.mark.parametrize("width", [1, 20, 300])
def test_any_width_is_kept(width: int) -> None:
    state = make_state(model="demo" * 100)
    shown = [
        panels.header(state, "note" * 50, width),
        panels.memory(state, width),
        panels.traffic(state, points((1, 2)), width),
        panels.latency(state, width),
        panels.events(state.events, "all", width, 5),
        panels.requests(state.requests, width, 5),
    ]
    for part in shown:
        assert max(map(len, part.plain.splitlines())) <= width or part is shown[1]
