"""The drawing of one run: panels over a shared time axis."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from morphserve.morphcli.bench.frame import Frame, count_events
from morphserve.morphcli.bench.panels import LEFT_IN, RIGHT_IN, WIDTH_IN, panels_of
from morphserve.morphcli.bench.summary import Run
from morphserve.profile.drawing import COLOURS, STYLE

_TOP_IN, _BOTTOM_IN, _GAP_IN = 0.3, 0.42, 0.34


def timeline_figure(run: Run, frame: Frame) -> Figure:
    """One run in the frame of all."""
    panels = panels_of(run, frame)
    events = count_events(run, frame.bin_s)
    height = _TOP_IN + _BOTTOM_IN + sum(p.height_in for p in panels) + _GAP_IN * (len(panels) - 1)
    with mpl.rc_context(STYLE | {"axes.titlesize": 9.5, "font.size": 9.2, "legend.fontsize": 9}):
        figure = Figure(figsize=(WIDTH_IN, height))
        top = height - _TOP_IN
        for panel in panels:
            axes = _add_axes(figure, top, panel.height_in, frame)
            panel.draw(axes, run, frame, events)
            axes.tick_params(labelbottom=panel is panels[-1])
            top -= panel.height_in + _GAP_IN
        _draw_burst(figure.axes, frame)
        figure.axes[-1].set_xlabel(f"{frame.unit[0]} since the start", labelpad=2)
    return figure


def _add_axes(figure: Figure, top_in: float, height_in: float, frame: Frame) -> Axes:
    width, height = figure.get_size_inches()
    across = WIDTH_IN - LEFT_IN - RIGHT_IN
    place = (
        LEFT_IN / width,
        (top_in - height_in) / height,
        across / width,
        height_in / height,
    )
    axes = figure.add_axes(place)
    unit, seconds = frame.unit
    axes.set_xlim(0, frame.end_s)
    steps = (1, 2, 3, 6, 10) if unit != "seconds" else (1, 2, 5, 10)
    ticks = MaxNLocator(7, steps=steps).tick_values(0, frame.end_s / seconds)
    shown = [tick * seconds for tick in ticks if 0 <= tick * seconds <= frame.end_s]
    axes.set_xticks(shown, [f"{at / seconds:g}" for at in shown])
    axes.tick_params(length=2.5, pad=2)
    return axes


def _draw_burst(panels: Sequence[Axes], frame: Frame) -> None:
    if frame.burst is None:
        return
    for axes in panels:
        axes.axvspan(
            frame.burst.start_s, frame.burst.end_s, color=COLOURS["shade"], linewidth=0, zorder=0
        )
