"""Every drawing of a report, with its words."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from morphserve.morphcli.bench import curves, overview, precision
from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.frame import make_frame
from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.request import main_rate
from morphserve.morphcli.bench.summary import Run, meets, percentile, show_s, show_slo
from morphserve.morphcli.bench.table import policy_title, show_share
from morphserve.morphcli.bench.timeline import timeline_figure
from morphserve.morphcli.traces.schedule import Schedule
from morphserve.profile.drawing import as_file


@dataclass(frozen=True, slots=True)
class Drawing:
    name: str  # of its files
    caption: str
    alt: str  # what it shows, for who cannot see it
    figure: Figure = field(repr=False)
    svg: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Drawings:
    """By the parts of the page in which they stand."""

    compared: list[Drawing]
    load: list[Drawing]  # of a sweep
    timelines: list[Drawing]
    quality: list[Drawing]

    def __iter__(self) -> Iterator[Drawing]:
        yield from (*self.compared, *self.load, *self.timelines, *self.quality)


def draw_all(summary: Summary, runs: Sequence[Run], schedule: Schedule) -> Drawings:
    """What the figures and runs at hand allow to draw."""
    at_rate = runs_shown(summary, runs)
    return Drawings(
        list(_compared(summary, at_rate)),
        list(_load(summary)) if summary.curve else [],
        list(_timelines(summary, at_rate, schedule)),
        list(_quality(summary, at_rate)),
    )


def runs_shown(summary: Summary, runs: Sequence[Run]) -> list[Run]:
    """The runs at the load that the summary tells in full, in the order of its policies."""
    rate, order = main_rate(summary.settings.rates), [p.policy for p in summary.policies]
    told = [run for run in runs if run.rate == rate]
    return sorted(told, key=lambda run: order.index(run.policy))


def median_runs(summary: Summary, runs: Sequence[Run]) -> list[Run]:
    """Of each policy the repeat in the middle, by missed targets and then by first tokens."""
    slo = summary.settings.slo

    def rank(run: Run) -> tuple[int, float]:
        first = [math.inf if o.ttft_s is None else o.ttft_s for o in run.outcomes]
        return sum(not meets(o, slo) for o in run.outcomes), percentile(first, 95)

    found = []
    for policy in dict.fromkeys(run.policy for run in runs):
        ranked = sorted((run for run in runs if run.policy == policy), key=rank)
        found.append(ranked[(len(ranked) - 1) // 2])
    return found


def _drawing(name: str, caption: str, alt: str, figure: Figure) -> Drawing:
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    return Drawing(safe, caption, alt, figure, as_file(figure, "svg", alt))


def _compared(summary: Summary, runs: Sequence[Run]) -> Iterator[Drawing]:
    repeated = " Whiskers: 95 % interval." if any(p.repeats for p in summary.policies) else ""
    yield _drawing(
        "overview",
        f"Figure by figure.{repeated}",
        "The main figures of each policy: " + "; ".join(map(_in_words, summary.policies)),
        overview.overview_figure(summary),
    )
    scatter = overview.scatter_figure(summary)
    if scatter is not None:
        yield _drawing(
            "quality-latency",
            "Quality against latency: best at the lower left.",
            "Perplexity over full precision against the 95th percentile of first tokens; the "
            "table holds both",
            scatter,
        )
    yield _drawing(
        "distributions",
        "How latencies spread: share of requests at or below.",
        "Cumulative shares of requests by time to first token and by time per further token, one "
        "line for each policy; the table holds percentiles",
        curves.distributions_figure(runs, summary.settings.slo),
    )


def _in_words(policy: PolicySummary) -> str:
    p95 = policy.ttft_s.p95
    first = "never" if p95 is None else f"within {show_s(p95)}"
    return (
        f"{policy_title(policy.policy)} missed the target for {show_share(policy.slo_miss_share)}, "
        f"95 % had their first token {first}, {policy.output_tokens_per_s:,.0f} tokens per second"
    )


def _load(summary: Summary) -> Iterator[Drawing]:
    curve, slo = summary.curve, summary.settings.slo
    is_invalid = any(point.faults for point in curve)
    hollow = " Hollow: a run that proves nothing." if is_invalid else ""
    alt = "over requests offered per second, one line for each policy; the table below holds it"
    yield _drawing(
        "attainment",
        f"Who keeps the target ({show_slo(slo)}) as load grows.{hollow}",
        f"Share of requests within the target {alt}",
        curves.attainment_figure(curve),
    )
    yield _drawing(
        "goodput",
        f"Requests served in time.{hollow}",
        f"Goodput {alt}",
        curves.goodput_figure(curve),
    )
    yield _drawing(
        "first-tokens-over-load",
        f"How long the first token takes as load grows.{hollow}",
        f"95th percentile of first tokens {alt}",
        curves.first_tokens_figure(curve, slo.ttft_s),
    )
    yield _drawing(
        "throughput",
        f"Tokens made as load grows.{hollow}",
        f"Output tokens per second {alt}",
        curves.throughput_figure(curve),
    )


def _timelines(summary: Summary, runs: Sequence[Run], schedule: Schedule) -> Iterator[Drawing]:
    shown = median_runs(summary, runs)
    frame = make_frame(shown, schedule.duration_s, summary.settings.slo, summary.trace.burst)
    for run in shown:
        title = policy_title(run.policy)
        repeats = sum(other.policy == run.policy for other in runs)
        which = f", repeat {run.repeat + 1} of {repeats}" if repeats > 1 else ""
        missed = sum(not meets(o, frame.slo) for o in run.outcomes)
        alt = (
            f"{title} over time: {len(run.outcomes)} requests offered, {missed} missed the target; "
            "panels show load, requests in the server, KV cache, precision of layers, first "
            "tokens, swaps and preemptions"
        )
        yield _drawing(f"timeline-{run.policy}", title + which, alt, timeline_figure(run, frame))


def _quality(summary: Summary, runs: Sequence[Run]) -> Iterator[Drawing]:
    counts = precision.token_counts(summary.policies, runs)
    if counts:
        yield _drawing(
            "tokens-by-precision",
            "At which precision tokens were made.",
            "Share of output tokens by precision, a bar for each policy",
            precision.precisions_figure(counts),
        )
    positions = precision.positions_figure(summary.policies)
    if positions is not None:
        yield _drawing(
            "tokens-by-place",
            "Where in the answers tokens were made below full precision.",
            "Share of tokens below full precision by their place in the answer",
            positions,
        )
