"""The panels of a timeline, each of one run in the frame that all runs share."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from morphserve.morphcli.bench.frame import Events, Frame, in_flight
from morphserve.morphcli.bench.marks import (
    Segment,
    distinct,
    draw_dots,
    draw_segments,
    spans,
    thin,
)
from morphserve.morphcli.bench.server import State
from morphserve.morphcli.bench.summary import Run, meets, show_s
from morphserve.profile.drawing import COLOURS

WIDTH_IN = 5.0  # of the drawing; it fits a phone, and three of them a desk's screen
LEFT_IN, RIGHT_IN = 0.52, 0.12  # beside the panels
_ACROSS_IN = WIDTH_IN - LEFT_IN - RIGHT_IN
_MAX_STRIPS = 8000  # of all layers; more make a page heavy and no clearer
_MANY_DOTS = 4000
_PRECISIONS = {"full": "full", "int8": "int8", "int4": "orange", "moving": "moving"}
_NAMES = {"full": "full", "int8": "INT8", "int4": "INT4", "moving": "moving"}


@dataclass(frozen=True, slots=True)
class Panel:
    height_in: float
    draw: Callable[[Axes, Run, Frame, Events], None]


def panels_of(run: Run, frame: Frame) -> list[Panel]:
    """From the top; a server that does not tell its state has few."""
    panels = [Panel(0.5, _draw_offered), Panel(0.75, _draw_requests)]
    if run.states:
        panels += [Panel(1.0, _draw_cache), Panel(_layers_in(run), _draw_layers)]
    panels.append(Panel(1.2, _draw_first_tokens))
    if run.states and frame.swaps:
        panels.append(Panel(0.34, _draw_swaps))
    if run.states and frame.preemptions:
        panels.append(Panel(0.34, _draw_preemptions))
    return panels


def _layers_in(run: Run) -> float:
    return min(1.5, max(0.6, 0.1 * len(run.states[0].layers)))


def _head(axes: Axes, title: str, handles: Iterable[Line2D | Patch] = ()) -> None:
    axes.set_title(title, pad=5, x=-LEFT_IN / _ACROSS_IN)
    shown = list(handles)
    if shown:
        axes.legend(
            handles=shown,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(shown),
            borderpad=0,
            borderaxespad=0.3,
            columnspacing=1.0,
            handlelength=1.1,
            handletextpad=0.4,
        )


def _line(name: str, colour: str, style: Literal["-", "--", ":"] = "-") -> Line2D:
    return Line2D([], [], color=COLOURS[colour], linestyle=style, linewidth=1.6, label=name)


def _dot(name: str, colour: str, marker: str = "o") -> Line2D:
    return Line2D(
        [], [], color=COLOURS[colour], marker=marker, markersize=4, linestyle="", label=name
    )


def _linear(axes: Axes, high: float, ticks: int) -> None:
    axes.set_ylim(0, 1.06 * high)
    axes.yaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _: object = None) -> str:
    value = abs(value)
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:,.0f}"


def _bars(axes: Axes, counts: Iterable[tuple[int, float]], bin_s: float, colour: str) -> None:
    known = [(at, count) for at, count in counts if count]
    lefts = [at * bin_s for at, _ in known]
    heights = [count for _, count in known]
    width = 0.86 * bin_s
    axes.bar(lefts, heights, width, align="edge", color=COLOURS[colour], linewidth=0, zorder=2)


def _draw_offered(axes: Axes, run: Run, frame: Frame, events: Events) -> None:
    burst = [Patch(color=COLOURS["shade"], label="burst")] if frame.burst else []
    _head(axes, "requests offered per second", burst)
    rates = ((at, count / frame.bin_s) for at, count in events.offered.items())
    _bars(axes, rates, frame.bin_s, "muted")
    _linear(axes, frame.rate, 3)


def _samples(
    run: Run, value: Callable[[State], float], frame: Frame
) -> tuple[list[float], list[float]]:
    found = [(run.at_s(s), float(value(s))) for s in run.states if run.at_s(s) >= 0]
    thinned = thin(found, frame.hair_s)
    return [at for at, _ in thinned], [level for _, level in thinned]


def _stairs(axes: Axes, run: Run, frame: Frame, value: Callable[[State], float]) -> Line2D:
    (line,) = axes.step(*_samples(run, value, frame), where="post")
    return line


def _draw_requests(axes: Axes, run: Run, frame: Frame, events: Events) -> None:
    if run.states:
        at, waiting = _samples(run, lambda s: s.waiting, frame)
        axes.fill_between(
            at, waiting, step="post", color=COLOURS["orange"], alpha=0.35, linewidth=0
        )
        _stairs(axes, run, frame, lambda s: s.waiting).set(color=COLOURS["orange"], linewidth=0.9)
        _stairs(axes, run, frame, lambda s: s.running).set(color=COLOURS["blue"], linewidth=1.4)
        handles = [_line("running", "blue"), _line("waiting", "orange")]
        title = "requests in the server"
    else:
        levels = thin([(at, float(n)) for at, n in in_flight(run.outcomes)], frame.hair_s)
        axes.step(*zip(*levels, strict=True), where="post", color=COLOURS["blue"], linewidth=1.4)
        handles, title = [], "requests in flight, as the client saw it"
    _linear(axes, 1.12 * frame.requests, 3)
    refused = [o.intended_s for o in run.outcomes if o.status not in (0, 200)]
    if refused:
        places = distinct(((at, 0.0) for at in refused), (frame.hair_s, 1.0))
        axes.plot(
            [x for x, _ in places],
            [0.94] * len(places),
            "|",
            transform=axes.get_xaxis_transform(),
            color=COLOURS["pink"],
            markersize=6,
        )
        handles.append(_dot(f"refused ({len(refused):,})", "pink", "|"))
    _head(axes, title, handles)


def _draw_cache(axes: Axes, run: Run, frame: Frame, events: Events) -> None:
    size = run.states[0].block_tokens
    at, used = _samples(run, lambda s: s.blocks_used * size, frame)
    axes.fill_between(at, used, step="post", color=COLOURS["blue"], alpha=0.35, linewidth=0)
    capacity = _stairs(axes, run, frame, lambda s: s.blocks_capacity * size)
    capacity.set(color=COLOURS["ink"], linewidth=1.6)
    full = run.states[0].blocks_full * size
    axes.axhline(full, color=COLOURS["muted"], linewidth=1, linestyle=(0, (2, 2)))
    _linear(axes, frame.kv_tokens, 4)
    used_patch = Patch(facecolor=COLOURS["blue"], alpha=0.35, label="used")
    full_line = _line("at full precision", "muted", ":")
    _head(axes, "KV cache, tokens", [used_patch, _line("capacity", "ink"), full_line])


def _draw_layers(axes: Axes, run: Run, frame: Frame, events: Events) -> None:
    order = frame.layers
    shortest = max(frame.hair_s, len(order) * frame.end_s / _MAX_STRIPS)
    strips: dict[str, list[Segment]] = {name: [] for name in _PRECISIONS}
    for row, layer in enumerate(order):
        samples = ((max(0.0, run.at_s(s)), _precision(s, layer)) for s in run.states)
        for start, stop, name in spans(samples, run.at_s(run.states[-1]), shortest):
            strips[name].append((start, stop, float(row)))
    row_points = 72 * _layers_in(run) / len(order)
    thick = row_points * (0.86 if row_points > 3 else 1.0)
    axes.set_ylim(-0.5, len(order) - 0.5)
    for name, segments in strips.items():
        draw_segments(axes, segments, _PRECISIONS[name], thick)
    rows = range(len(order)) if len(order) <= 12 else (0, len(order) - 1)
    axes.set_yticks(list(rows), [str(order[row]) for row in rows])
    axes.tick_params(axis="y", labelsize=6.5 if len(order) > 6 else 8, length=0)
    axes.grid(visible=False)
    named = [Patch(color=COLOURS[_PRECISIONS[n]], label=_NAMES[n]) for n in strips if strips[n]]
    _head(axes, "precision of each layer", named)


def _precision(state: State, layer: int) -> str:
    return "moving" if layer in state.swapping else state.layers[layer].value


def _draw_first_tokens(axes: Axes, run: Run, frame: Frame, events: Events) -> None:
    axes.set_yscale("log")
    axes.set_ylim(frame.fastest_s, frame.slowest_s)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show_s(value)))
    answered = [(o, max(o.ttft_s, frame.fastest_s)) for o in run.outcomes if o.ttft_s is not None]
    good = [(o.intended_s, ttft) for o, ttft in answered if meets(o, frame.slo)]
    missed = [(o.intended_s, ttft) for o, ttft in answered if not meets(o, frame.slo)]
    for places, colour in ((good, "blue"), (missed, "orange")):
        wide = 1 if len(places) < _MANY_DOTS else 3  # in a crowd, gaps of a point are filled
        cells = distinct(
            ((x, math.log10(y)) for x, y in places), (wide * frame.hair_s, wide * 0.015)
        )
        draw_dots(axes, ((x, 10**y) for x, y in cells), colour, 3.2, alpha=0.75)
    handles = [_dot("in target", "blue"), _dot("missed", "orange")]
    lost = [o.intended_s for o in run.outcomes if o.ttft_s is None]
    if lost:
        places = distinct(((at, 0.0) for at in lost), (frame.hair_s, 1.0))
        axes.plot(
            [x for x, _ in places],
            [0.96] * len(places),
            "x",
            transform=axes.get_xaxis_transform(),
            color=COLOURS["orange"],
            markersize=4,
        )
        handles.append(_dot(f"no answer ({len(lost):,})", "orange", "x"))
    if frame.slo.ttft_s is not None:
        axes.axhline(frame.slo.ttft_s, color=COLOURS["ink"], linewidth=1, linestyle="--", zorder=4)
        handles.append(_line(f"target {show_s(frame.slo.ttft_s)}", "ink", "--"))
    _head(axes, "first token", handles)


def _draw_swaps(axes: Axes, run: Run, frame: Frame, events: Events) -> None:
    _draw_events(axes, "layer swaps", events.swaps, frame.swaps, "green", frame)


def _draw_preemptions(axes: Axes, run: Run, frame: Frame, events: Events) -> None:
    _draw_events(axes, "preemptions", events.preemptions, frame.preemptions, "pink", frame)


def _draw_events(
    axes: Axes, name: str, counts: Counter[int], most: float, colour: str, frame: Frame
) -> None:
    _bars(axes, counts.items(), frame.bin_s, colour)
    _linear(axes, max(1.0, most), 2)
    per = "second" if frame.bin_s == 1 else f"{frame.bin_s:g} s"
    _head(
        axes,
        f"{name} per {per}",
        [Patch(color=COLOURS[colour], label=f"{counts.total():,} in all")],
    )
