"""All policies side by side: the figures that matter, and quality against latency."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from morphserve.morphcli.bench.figures import Interval, PolicySummary, Repeats
from morphserve.morphcli.bench.looks import Look, looks
from morphserve.morphcli.bench.panels import WIDTH_IN
from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.summary import show_s
from morphserve.morphcli.bench.table import policy_title
from morphserve.profile.drawing import COLOURS, STYLE
from morphserve.quantize.manifest import Variant

_LETTER_IN = 0.068  # of a policy's name, about


@dataclass(frozen=True, slots=True)
class _Measure:
    title: str
    value: Callable[[PolicySummary], float | None]
    interval: Callable[[Repeats], Interval | None]
    show: Callable[[float], str]
    log: bool = False


def base_perplexity(summary: Summary) -> float | None:
    """Perplexity with every layer at full precision, if it was measured."""
    full = (p.perplexity for p in summary.policies if p.policy == "full" and p.perplexity)
    every = (mix.perplexity for mix in summary.perplexities if set(mix.layers) == {Variant.FULL})
    return next(full, next(every, None))


def quality_loss(perplexity: float | None, base: float | None) -> float | None:
    """Rise of perplexity over full precision, in per cent."""
    return None if perplexity is None or base is None else 100 * (perplexity / base - 1)


def overview_figure(summary: Summary) -> Figure:
    """A panel for each measure, a row for each policy; whiskers where there are repeats."""
    policies = summary.policies
    found = [
        m for m in _measures(summary) if m.log or any(m.value(p) is not None for p in policies)
    ]
    rows = -(-len(found) // 2)
    with mpl.rc_context(STYLE | {"font.size": 9, "axes.titlesize": 9.5}):
        height = 0.05 + rows * (0.4 + 0.21 * len(policies))
        figure = Figure(figsize=(WIDTH_IN, height))
        longest = max(len(policy_title(policy.policy)) for policy in policies)
        left, right = min(0.4, (0.25 + _LETTER_IN * longest) / WIDTH_IN), 0.98
        grid = figure.subplots(rows, 2, squeeze=False, sharey=True)
        figure.subplots_adjust(
            left=left, right=right, top=1 - 0.3 / height, bottom=0.1 / height,
            wspace=0.12, hspace=0.4 / (0.21 * len(policies)),
        )  # fmt: skip
        panels = list(grid.flat)
        for axes, measure in zip(panels, found, strict=False):
            _draw_measure(axes, measure, policies)
        for axes in panels[len(found) :]:
            axes.set_visible(False)
    return figure


def _measures(summary: Summary) -> list[_Measure]:
    base = base_perplexity(summary)

    def loss_interval(repeats: Repeats) -> Interval | None:
        found = repeats.perplexity
        low = quality_loss(found.low if found else None, base)
        high = quality_loss(found.high if found else None, base)
        return None if low is None or high is None else Interval(low, high)

    def miss_interval(repeats: Repeats) -> Interval | None:
        found = repeats.slo_miss_share
        return found and Interval(100 * max(0, found.low), 100 * min(1, found.high))

    return [
        _Measure("missed the target", lambda p: 100 * p.slo_miss_share, miss_interval, _percent),
        _Measure(
            "first token, P95", lambda p: p.ttft_s.p95, lambda r: r.ttft_p95_s, show_s, log=True
        ),
        _Measure(
            "output tokens/s",
            lambda p: p.output_tokens_per_s,
            lambda r: r.output_tokens_per_s,
            lambda value: f"{value:,.0f}",
        ),
        _Measure("further token, P95", lambda p: p.tpot_s.p95, lambda r: r.tpot_p95_s, show_s),
        _Measure(
            "quality loss",
            lambda p: quality_loss(p.perplexity, base),
            loss_interval,
            lambda value: f"{value:.2f} %",
        ),
        _Measure(
            "in target, requests/s",
            lambda p: p.goodput_per_s,
            lambda _: None,
            lambda value: f"{value:.2f}",
        ),
    ]


def _percent(value: float) -> str:
    return f"{value:.0f} %" if value in (0, 100) else f"{value:.1f} %"


def _draw_measure(axes: Axes, measure: _Measure, policies: Sequence[PolicySummary]) -> None:
    found = looks([policy.policy for policy in policies])
    names = [policy_title(policy.policy) for policy in policies]
    axes.set_title(measure.title, pad=4)
    axes.set_yticks(range(len(policies)), names)
    axes.set_ylim(len(policies) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, pad=8, labelcolor=COLOURS["ink"])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(not measure.log)
    axes.grid(visible=False)
    _set_scale(axes, measure, policies)
    axes.set_xticks([])  # the values stand beside the marks
    axes.set_xticks([], minor=True)
    for row, policy in enumerate(policies):
        _draw_row(axes, row, measure, policy, found[policy.policy])


def _ends(measure: _Measure, policy: PolicySummary) -> list[float]:
    interval = measure.interval(policy.repeats) if policy.repeats else None
    value = measure.value(policy)
    return [*([] if value is None else [value]), *([interval.high] if interval else [])]


def _set_scale(axes: Axes, measure: _Measure, policies: Sequence[PolicySummary]) -> None:
    ends = [end for policy in policies for end in _ends(measure, policy)]
    least = min((v for p in policies if (v := measure.value(p)) is not None), default=1.0)
    if measure.log:
        axes.set_xscale("log")
        low, high = 0.5 * max(least, 1e-4), max([*ends, 1e-3])
        axes.set_xlim(low, low * (high / low) ** 1.75)  # room for the value beside a mark
        return
    axes.set_xlim(min(0.0, 1.2 * least), 1.5 * max([*ends, 1e-3]))


def _draw_row(axes: Axes, row: int, measure: _Measure, policy: PolicySummary, look: Look) -> None:
    value, colour = measure.value(policy), COLOURS[look.colour]
    if value is None:
        text = "never" if measure.log else "–"
        axes.annotate(
            text, (0.98, row), xycoords=axes.get_yaxis_transform(), ha="right", va="center",
            color=COLOURS["muted"],
        )  # fmt: skip
        return
    if not measure.log:
        axes.plot([0, value], [row, row], color=colour, linewidth=1.2, alpha=0.6)
    axes.plot([value], [row], look.marker, color=colour, markersize=5.5, clip_on=False, zorder=3)
    interval = measure.interval(policy.repeats) if policy.repeats else None
    if interval is not None:
        axes.plot(
            [max(interval.low, axes.get_xlim()[0]), interval.high], [row, row], "|-",
            color=COLOURS["muted"], linewidth=1.2, markersize=9, zorder=2,
        )  # fmt: skip
    axes.annotate(
        measure.show(value), (max(_ends(measure, policy)), row), xytext=(6, 0),
        textcoords="offset points", va="center", fontsize=8.5,
    )  # fmt: skip


def scatter_figure(summary: Summary) -> Figure | None:
    """Quality loss against the 95th percentile of first tokens; None without perplexities."""
    base = base_perplexity(summary)
    known = [p for p in summary.policies if quality_loss(p.perplexity, base) is not None]
    if len(known) < 2:
        return None
    with mpl.rc_context(STYLE | {"font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8.5}):
        figure = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
        axes = figure.add_subplot()
        _draw_scatter(axes, known, base, summary)
    return figure


def _draw_scatter(
    axes: Axes, policies: Sequence[PolicySummary], base: float | None, summary: Summary
) -> None:
    found = looks([policy.policy for policy in summary.policies])
    times = [p.ttft_s.p95 for p in policies if p.ttft_s.p95 is not None]
    low, high = min(times, default=0.1) / 1.8, max(times, default=1.0) * 1.8
    never = any(p.ttft_s.p95 is None for p in policies)
    axes.set_xscale("log")
    axes.set_xlim(low, high * (1.8 if never else 1))
    for policy in policies:
        loss = quality_loss(policy.perplexity, base)
        assert loss is not None
        look, ttft = found[policy.policy], policy.ttft_s.p95
        x = high if ttft is None else ttft
        _draw_cross_hair(axes, policy, base, x, loss)
        axes.plot(
            [x], [loss], look.marker, label=policy_title(policy.policy),
            color=COLOURS[look.colour], markersize=9,
            markeredgecolor=COLOURS["card"], markeredgewidth=0.8, clip_on=False, zorder=4,
        )  # fmt: skip
    target = summary.settings.slo.ttft_s
    if target is not None and low < target < high:
        _draw_limit(axes, target, f"target {show_s(target)}")
    if never:
        _draw_limit(axes, high, "never: too few were answered")
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, -0.06 * top) - 0.08 * top, 1.08 * top)
    axes.annotate(
        "best: fast, no loss", (0.015, 0.02), xycoords="axes fraction", color=COLOURS["ink"],
        weight="bold", fontsize=8.5,
    )  # fmt: skip
    axes.set(
        xlabel="95 % of requests had their first token within",
        ylabel="perplexity over full precision, %",
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show_s(value)))
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.45, -0.17), handletextpad=0.4,
        ncols=3 if len(policies) == 3 else 2,
    )  # fmt: skip


def _draw_limit(axes: Axes, at: float, text: str) -> None:
    axes.axvline(at, color=COLOURS["muted"], linewidth=0.9, linestyle="--", zorder=1)
    axes.annotate(
        text, (at, 1.0), xytext=(-4, -2), xycoords=axes.get_xaxis_transform(),
        textcoords="offset points", rotation=90, ha="right", va="top", fontsize=8,
        color=COLOURS["muted"],
    )  # fmt: skip


def _draw_cross_hair(
    axes: Axes, policy: PolicySummary, base: float | None, x: float, loss: float
) -> None:
    if policy.repeats is None:
        return
    colour = COLOURS["ink"]
    if (first := policy.repeats.ttft_p95_s) is not None:
        axes.plot([max(first.low, 1e-4), first.high], [loss, loss], color=colour, linewidth=1)
    if (spread := policy.repeats.perplexity) is not None:
        ends = [quality_loss(spread.low, base) or 0.0, quality_loss(spread.high, base) or 0.0]
        axes.plot([x, x], ends, color=colour, linewidth=1)
