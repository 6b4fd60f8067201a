"""Repeats of the same run: their figures together, and how far they differ."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

import msgspec

from morphserve.morphcli.bench.figures import Interval, PolicySummary, Repeats, ServerFigures
from morphserve.morphcli.bench.record import LoadPoint
from morphserve.morphcli.bench.summary import Run, percentiles
from morphserve.morphcli.bench.table import policy_title

# Student's t at 97.5 % for 1, 2, ... degrees of freedom; the normal distribution's beyond.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
_NORMAL = 1.96


def interval(values: Sequence[float | None], most: float = math.inf) -> Interval | None:
    """95 % confidence interval of the mean, by Student's t; None: fewer than two, or one unknown.

    Figures of a run are never below 0 nor above `most`, and neither is the interval.
    """
    known = [value for value in values if value is not None]
    if len(known) < 2 or len(known) < len(values):
        return None
    t = _T[len(known) - 2] if len(known) - 2 < len(_T) else _NORMAL
    half = t * stdev(known) / math.sqrt(len(known))
    return Interval(max(0.0, fmean(known) - half), min(most, fmean(known) + half))


def spread(summaries: Sequence[PolicySummary]) -> Repeats | None:
    """How far the runs of one policy differ; None for a single one."""
    if len(summaries) < 2:
        return None
    return Repeats(
        count=len(summaries),
        slo_miss_share=interval([s.slo_miss_share for s in summaries], most=1.0),
        ttft_p95_s=interval([s.ttft_s.p95 for s in summaries]),
        tpot_p95_s=interval([s.tpot_s.p95 for s in summaries]),
        output_tokens_per_s=interval([s.output_tokens_per_s for s in summaries]),
        perplexity=interval([s.perplexity for s in summaries]),
    )


def pooled(runs: Sequence[Run], summaries: Sequence[PolicySummary]) -> PolicySummary:
    """The figures of repeats of one policy together.

    Percentiles are over the requests of all of them, counts of requests are sums, rates are over
    the sum of their durations; what their servers counted is the mean per run.
    """
    if len(runs) == 1:
        return msgspec.structs.replace(summaries[0])
    outcomes = [o for run in runs for o in run.outcomes]
    finished = [o for o in outcomes if o.error is None]
    duration_s = sum(s.duration_s for s in summaries)
    return PolicySummary(
        policy=runs[0].policy,
        offered=len(outcomes),
        finished=len(finished),
        refused=sum(s.refused for s in summaries),
        unfinished=sum(s.unfinished for s in summaries),
        failed=sum(s.failed for s in summaries),
        slo_misses=sum(s.slo_misses for s in summaries),
        ttft_s=percentiles(o.ttft_s for o in outcomes),
        tpot_s=percentiles(o.tpot_s for o in finished if o.output_tokens > 1),
        e2e_s=percentiles(o.e2e_s for o in outcomes),
        itl_s=percentiles(gap for o in finished for gap in o.gaps_s),
        queue_s=percentiles(o.queue_s for o in outcomes if o.queue_s is not None),
        duration_s=duration_s,
        output_tokens_per_s=sum(o.output_tokens for o in finished) / duration_s,
        finished_per_s=len(finished) / duration_s,
        goodput_per_s=sum(s.offered - s.slo_misses for s in summaries) / duration_s,
        lag_p50_s=max(s.lag_p50_s for s in summaries),
        lag_p99_s=max(s.lag_p99_s for s in summaries),
        lag_max_s=max(s.lag_max_s for s in summaries),
        faults=[f"repeat {i}: {f}" for i, s in enumerate(summaries, 1) for f in s.faults],
        server=_pooled_server(runs, [s.server for s in summaries]),
        rate=runs[0].rate,
    )


def _pooled_server(
    runs: Sequence[Run], figures: Sequence[ServerFigures | None]
) -> ServerFigures | None:
    known = [figure for figure in figures if figure is not None]
    if not known or len(known) < len(figures):
        return None
    tokens = [run.states[-1].num_generated - run.states[0].num_generated for run in runs]
    return ServerFigures(
        preemptions=fmean(f.preemptions for f in known),
        swaps=fmean(f.swaps for f in known),
        quantized_token_share=_mean([f.quantized_token_share for f in known], tokens),
        quantized_layers_max=max(f.quantized_layers_max for f in known),
        quantized_layers_at_end=max(f.quantized_layers_at_end for f in known),
        int4_layers_mean=_mean([f.int4_layers_mean for f in known], tokens),
        int4_layers_max=max(f.int4_layers_max for f in known),
        kv_tokens_min=min(f.kv_tokens_min for f in known),
        kv_tokens_max=max(f.kv_tokens_max for f in known),
        full_again_s=_full_again(known),
        later_episodes=fmean(f.later_episodes for f in known),
    )


def _full_again(figures: Sequence[ServerFigures]) -> float | None:
    """The latest of the repeats that left full precision; None: none did, or one is not back."""
    left = [f for f in figures if f.quantized_layers_max]
    if any(f.quantized_layers_at_end for f in left):
        return None
    return max((f.full_again_s for f in left if f.full_again_s is not None), default=None)


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None and w > 0]
    return fmean(*zip(*pairs, strict=True)) if pairs else None


def load_point(policy: PolicySummary, repeats: int, schedule_s: float) -> LoadPoint:
    """One policy at one load of a sweep; `schedule_s` is how long one repeat sent requests.

    What was offered knows nothing of how long its answers took, so all policies share it.
    """
    return LoadPoint(
        policy=policy.policy,
        rate=policy.rate,
        offered_per_s=policy.offered / (repeats * max(schedule_s, 1.0)),
        attainment=policy.slo_attainment,
        goodput_per_s=policy.goodput_per_s,
        output_tokens_per_s=policy.output_tokens_per_s,
        ttft_p95_s=policy.ttft_s.p95,
        tpot_p95_s=policy.tpot_s.p95,
        repeats=repeats,
        faults=policy.faults,
    )


def invalid_loads(curve: Sequence[LoadPoint], main: float) -> Iterator[str]:
    """A sentence for each load whose run proves nothing; that of the main one is in the verdict."""
    for point in curve:
        if point.faults and point.rate != main:
            yield (
                f"{policy_title(point.policy)} at {point.rate:g} times the load proves nothing: "
                f"{'; '.join(point.faults)}."
            )
