"""Curves of all policies: how latencies spread, and what becomes of them as load grows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from morphserve.configs.schema import Slo
from morphserve.morphcli.bench.looks import Look, looks
from morphserve.morphcli.bench.panels import WIDTH_IN
from morphserve.morphcli.bench.record import LoadPoint
from morphserve.morphcli.bench.summary import Run, show_s
from morphserve.morphcli.bench.table import policy_title
from morphserve.profile.drawing import COLOURS, STYLE

_LOOK = STYLE | {"font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8.5}
_MAX_POINTS = 300  # of one curve


def distributions_figure(runs: Sequence[Run], slo: Slo) -> Figure:
    """Shares of requests by time to first token and by time per further token, repeats pooled."""
    policies = list(dict.fromkeys(run.policy for run in runs))
    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(WIDTH_IN, 4.2), layout="constrained")
        first, further = figure.subplots(2, 1)
        for policy, look in looks(policies).items():
            outcomes = [o for run in runs if run.policy == policy for o in run.outcomes]
            _draw_shares(first, [o.ttft_s for o in outcomes], policy, look)
            done = [o for o in outcomes if o.error is None and o.output_tokens > 1]
            _draw_shares(further, [o.tpot_s for o in done], policy, look)
        _finish_shares(first, "time to first token, of all requests offered", slo.ttft_s)
        _finish_shares(further, "time per further token, of answered requests", slo.tpot_s)
        _legend_below(figure, further, len(policies))
    return figure


def _draw_shares(axes: Axes, values: Sequence[float | None], policy: str, look: Look) -> None:
    """What was never answered is in the whole, so that such a curve ends below 100 %."""
    known = sorted(value for value in values if value is not None)
    if not known:
        axes.plot([], [], **_line(policy, look))
        return
    step = max(1, len(known) // _MAX_POINTS)
    ranks = sorted({*range(0, len(known), step), len(known) - 1})
    shares = [100 * (rank + 1) / len(values) for rank in ranks]
    axes.step([max(known[r], 1e-4) for r in ranks], shares, where="post", **_line(policy, look))


def _line(policy: str, look: Look) -> dict[str, Any]:
    return {
        "color": COLOURS[look.colour],
        "linestyle": look.dashes,
        "linewidth": 2.2 if policy.startswith("morph") else 1.5,
        "label": policy_title(policy),
    }


def _finish_shares(axes: Axes, title: str, target: float | None) -> None:
    axes.set_title(title, pad=4)
    axes.set_xscale("log")
    if not any(np.size(line.get_xdata()) for line in axes.lines):
        axes.set_xlim(0.01, 10)
    axes.set_ylim(0, 101)
    axes.set_yticks([0, 25, 50, 75, 95], ["0 %", "25 %", "50 %", "75 %", "95 %"])
    _seconds_axis(axes, 1)
    if target is not None:
        axes.axvline(target, color=COLOURS["ink"], linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        low, high = axes.get_xlim()
        is_left = target < math.sqrt(low * high)
        axes.annotate(
            f"target {show_s(target)}", (target, 3), xytext=(4 if is_left else -4, 0),
            textcoords="offset points", ha="left" if is_left else "right", fontsize=8,
            color=COLOURS["muted"],
        )  # fmt: skip


def _seconds_axis(axes: Axes, axis: int) -> None:
    chosen = axes.xaxis if axis == 1 else axes.yaxis
    low, high = chosen.get_view_interval()
    decades = math.log10(max(high, 1e-9) / max(low, 1e-9))
    chosen.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    chosen.set_minor_locator(NullLocator())
    chosen.set_major_formatter(FuncFormatter(lambda value, _: show_s(value)))


def _legend_below(figure: Figure, axes: Axes, number: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if number in (3, 5, 6) and max(map(len, labels)) < 18 else 2
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, handlelength=2.4,
        columnspacing=1.2,
    )  # fmt: skip


def attainment_figure(curve: Sequence[LoadPoint]) -> Figure:
    """Share of requests within the target over the load offered."""
    figure, axes = _over_load(curve, "attainment", lambda point: 100 * point.attainment)
    axes.set(ylabel="of offered requests, %", ylim=(0, 103))
    return figure


def goodput_figure(curve: Sequence[LoadPoint]) -> Figure:
    """Requests per second within the target over the load offered."""
    figure, axes = _over_load(curve, "goodput", lambda point: point.goodput_per_s)
    most = max(point.offered_per_s for point in curve)
    axes.plot([0, most], [0, most], color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (2, 2)))
    axes.annotate(
        "all that is offered", (most, most), xytext=(-4, 2), textcoords="offset points",
        ha="right", fontsize=8, color=COLOURS["muted"],
    )  # fmt: skip
    axes.set(ylabel="requests/s within the target")
    axes.set_ylim(0, 1.12 * most)
    return figure


def throughput_figure(curve: Sequence[LoadPoint]) -> Figure:
    """Output tokens per second over the load offered."""
    figure, axes = _over_load(curve, "throughput", lambda point: point.output_tokens_per_s)
    axes.set(ylabel="output tokens/s")
    axes.set_ylim(bottom=0)
    return figure


def first_tokens_figure(curve: Sequence[LoadPoint], target: float | None) -> Figure:
    """The 95th percentile of first tokens over the load offered."""
    figure, axes = _over_load(curve, "first token, P95", lambda point: point.ttft_p95_s)
    axes.set_yscale("log")
    if all(point.ttft_p95_s is None for point in curve):
        axes.set_ylim(0.01, 10)
    _seconds_axis(axes, 2)
    if target is not None:
        axes.axhline(target, color=COLOURS["ink"], linewidth=0.9, linestyle=(0, (4, 2)))
    return figure


def _draw_hollow(axes: Axes, points: Sequence[tuple[float, float]], look: Look) -> None:
    """Over points of runs that prove nothing."""
    if points:
        axes.plot(
            [x for x, _ in points], [y for _, y in points], look.marker, markersize=5,
            color=COLOURS[look.colour], markerfacecolor=COLOURS["card"], zorder=3,
        )  # fmt: skip


def _over_load(
    curve: Sequence[LoadPoint], title: str, value: Callable[[LoadPoint], float | None]
) -> tuple[Figure, Axes]:
    policies = list(dict.fromkeys(point.policy for point in curve))
    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(WIDTH_IN, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for policy, look in looks(policies).items():
            points = sorted(
                (point.offered_per_s, found, bool(point.faults))
                for point in curve
                if point.policy == policy and (found := value(point)) is not None
            )
            line = _line(policy, look) | {"marker": look.marker, "markersize": 5}
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], **line)
            _draw_hollow(axes, [(x, y) for x, y, is_invalid in points if is_invalid], look)
        axes.set_title(title)
        axes.set(xlabel="requests offered per second", xlim=(0, None))
        _legend_below(figure, axes, len(policies))
    return figure, axes
