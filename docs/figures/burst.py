"""Draws docs/burst.svg: a calm, a burst and a calm on `morph serve demo`, and what it decided.

    morph quantize demo --method rtn -o demo.morph
    morph profile demo --bundle demo.morph
    python docs/figures/burst.py demo.morph [--peak 3.5] [--policy balanced] [--out docs/burst.svg]

Run by hand, on a machine that does nothing else; it takes less than two minutes. Server and
requests stay on this machine. `--peak` is the burst's requests per second: raise it where the
machine is too fast to be pressed. A file whose name ends in .png is drawn as PNG.
"""

import argparse
import asyncio
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from burst_run import BURST_S, WATCHED_S, Recorded, record
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from morphserve.configs.load import resolve_model
from morphserve.morphcli.bench import server
from morphserve.quantize.manifest import Variant

LIMITS = ("27MiB", 640)  # memory budget, --max-model-len

# After Okabe and Ito: told apart by colour-blind readers too.
INK, MUTED, SHADE = "#1b1b19", "#6d6c66", "#f3efe4"
BLUE, GREEN = "#0072b2", "#009e73"
PRECISIONS = {Variant.FULL: "#dbe7f0", Variant.INT8: "#f0c36d", Variant.INT4: "#d55e00"}
STYLE: Any = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "path",  # looks the same wherever it is shown
    "svg.hashsalt": "morphserve",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def draw(recorded: Recorded) -> Figure:
    """Four panels over one time axis, and the decisions in words below."""
    reasons = [textwrap.wrap(f"{at_s:.1f} s: {text}", 118) for at_s, text in recorded.decisions]
    lines = sum(map(len, reasons))
    panels_in, words_in = 7.6, 0.65 + 0.18 * lines
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, panels_in + words_in), layout="constrained")
        panels, words = figure.subfigures(2, 1, height_ratios=[panels_in, words_in])
        load, cache, layers, first = panels.subplots(
            4, 1, sharex=True, height_ratios=[1, 2, 1.7, 1.4]
        )
        _draw_load(load, recorded)
        _draw_cache(cache, recorded)
        _draw_layers(layers, recorded)
        _draw_first_tokens(first, recorded)
        for axes in (load, cache, layers, first):
            _draw_marks(axes, recorded, numbered=axes is load)
        first.set(xlim=(0, WATCHED_S), xlabel="seconds")
        _write_reasons(words, reasons)
        return figure


def _draw_load(axes: Axes, recorded: Recorded) -> None:
    sent = [outcome.intended_s for outcome in recorded.outcomes]
    seconds = range(int(WATCHED_S))
    rates = [sum(second <= at < second + 1 for at in sent) for second in seconds]
    axes.bar(seconds, rates, width=0.9, align="edge", color=MUTED)
    axes.set_title(f"Requests sent in each second ({recorded.title})", pad=20)
    axes.set_ylim(0, max(rates) + 2)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.text(BURST_S[0] + 0.2, max(rates) + 1.9, "burst", va="top", color=MUTED)


def _draw_cache(axes: Axes, recorded: Recorded) -> None:
    times, states = recorded.times_s, recorded.states
    axes.set_title("KV cache, in tokens")
    size = states[0].block_tokens
    used = [size * state.blocks_used for state in states]
    axes.fill_between(times, used, color=BLUE, alpha=0.3, linewidth=0, label="used")
    capacity = [size * state.blocks_capacity for state in states]
    axes.step(times, capacity, where="post", color=BLUE, linewidth=2, label="capacity")
    wanted = [size * state.demand for state in states]
    label = "demand: what all requests want, 64 tokens ahead"
    axes.plot(times, wanted, color=INK, linewidth=1, linestyle="--", label=label)
    full = size * states[0].blocks_full
    axes.axhline(full, color=BLUE, linewidth=0.8, linestyle=":")
    axes.annotate("every layer at full precision", (WATCHED_S, 1.05 * full), color=BLUE, ha="right")
    # Demand far above the capacity would press all else to the ground.
    axes.set_ylim(0, min(1.6 * max(capacity), 1.08 * max(*capacity, *wanted)))
    _legend_in_title(axes)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _legend_in_title(axes: Axes, **kwargs: Any) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.98), ncols=3, **kwargs)


def _draw_layers(axes: Axes, recorded: Recorded) -> None:
    """One row per layer in the ladder's order: what goes first lies at the bottom."""
    first = recorded.states[0]
    order = list(dict.fromkeys(step.layer for step in first.ladder))
    ends = [*recorded.times_s[1:], WATCHED_S]
    shown = set()
    for row, layer in enumerate(order):
        spans = _spans([s.layers[layer] for s in recorded.states], recorded.times_s, ends)
        for variant, start_s, length_s in spans:
            shown.add(variant)
            axes.broken_barh([(start_s, length_s)], (row + 0.06, 0.88), color=PRECISIONS[variant])
    axes.set_yticks([row + 0.5 for row in range(len(order))], [str(layer) for layer in order])
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.set(title="Precision of each layer, the least important one at the bottom", ylabel="layer")
    named = [Patch(color=PRECISIONS[v], label=v.value) for v in PRECISIONS if v in shown]
    _legend_in_title(axes, handles=named)


def _spans(
    variants: Sequence[Variant], starts: Sequence[float], ends: Sequence[float]
) -> list[tuple[Variant, float, float]]:
    """Stretches of one precision: which, from when, for how long in seconds."""
    turns = [i for i, (a, b) in enumerate(pairwise(variants), 1) if a is not b]
    bounds = pairwise([0, *turns, len(variants)])
    return [(variants[a], starts[a], ends[b - 1] - starts[a]) for a, b in bounds]


def _draw_first_tokens(axes: Axes, recorded: Recorded) -> None:
    answered = [o for o in recorded.outcomes if o.ttft_s is not None]
    axes.plot(
        [o.intended_s for o in answered],
        [o.ttft_s or 0.0 for o in answered],
        ".",
        color=GREEN,
        markersize=7,
    )
    axes.set_title("Time to first token of each request, by when it was sent")
    axes.set_yscale("log")
    slowest_s = max(o.ttft_s or 0.0 for o in answered)
    axes.set_ylim(0.02, max(1.5, 1.5 * slowest_s))
    axes.yaxis.set_major_locator(LogLocator(subs=(1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))


def _draw_marks(axes: Axes, recorded: Recorded, numbered: bool) -> None:
    axes.axvspan(*BURST_S, color=SHADE, zorder=0)
    last_s = float("-inf")
    for number, (at_s, _) in enumerate(recorded.decisions, 1):
        axes.axvline(at_s, color=INK, linewidth=0.7, zorder=1, alpha=0.6)
        if numbered:
            last_s = max(at_s, last_s + 1.0)  # numbers keep clear of each other
            circle = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": INK}
            place = (last_s, 1.16)
            axes.annotate(
                str(number),
                place,
                xycoords=axes.get_xaxis_transform(),
                ha="center",
                va="center",
                bbox=circle,
                fontsize=7.5,
                annotation_clip=False,
            )


def _write_reasons(figure: SubFigure, reasons: Sequence[Sequence[str]]) -> None:
    lines = ["A block holds 16 tokens; rung 3 is three steps down the ladder of layers.", ""]
    for number, wrapped in enumerate(reasons, 1):
        lines += [f"{number:>2}   {wrapped[0]}", *(f"       {more}" for more in wrapped[1:])]
    inch = 1 / figure.bbox.height * figure.dpi
    figure.text(0.02, 1, "Decisions, as the log has them", va="top", weight="bold", fontsize=10)
    figure.text(0.02, 1 - 0.24 * inch, "\n".join(lines), va="top", linespacing=1.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--peak", type=float, default=3.5)
    parser.add_argument("--policy", default="balanced")
    parser.add_argument("--out", type=Path, default=Path("docs/burst.svg"))
    given = parser.parse_args()
    port = server.free_port()
    options = server.ServerOptions(resolve_model("demo"), given.bundle, *LIMITS)
    with tempfile.TemporaryDirectory() as folder, server.ended_by_signals():
        log = Path(folder) / "server.log"
        with server.running_server(options.arguments(given.policy, port), port, log) as url:
            recorded = asyncio.run(record(url, given.peak, f"policy {given.policy}"))
    failed = [o.error for o in recorded.outcomes if o.error]
    if failed:
        sys.exit(f"{len(failed)} requests failed, the first with: {failed[0]}")
    metadata = {"Date": None} if given.out.suffix == ".svg" else None
    with mpl.rc_context(STYLE):
        draw(recorded).savefig(given.out, dpi=110, metadata=metadata)
    print(f"wrote {given.out}, {given.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
