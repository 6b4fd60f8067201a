"""From finished runs to the summary and the report of the run folder."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from morphserve.morphcli.bench.answers import fill_answers
from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.record import (
    MixPerplexity,
    Settings,
    Simulated,
    Summary,
    TraceFacts,
    environment,
    now,
    trace_facts,
    write_summary,
)
from morphserve.morphcli.bench.references import Reference
from morphserve.morphcli.bench.repeats import invalid_loads, load_point, pooled, spread
from morphserve.morphcli.bench.report import write_report
from morphserve.morphcli.bench.request import BenchRequest, main_rate
from morphserve.morphcli.bench.summary import Run, summarise, tokens_per_mix
from morphserve.morphcli.traces.schedule import Schedule, find_burst

if TYPE_CHECKING:  # it imports torch, which a simulation does without
    from morphserve.morphcli.bench.quality import Quality


def facts_of(schedule: Schedule, prompts_as_token_ids: int, skipped: str) -> TraceFacts:
    """What the run's main schedule offers."""
    burst = find_burst(schedule.arrivals, schedule.duration_s)
    return trace_facts(schedule, prompts_as_token_ids, skipped, burst)


def conclude(
    request: BenchRequest,
    facts: TraceFacts,
    runs: Sequence[Run],
    schedule: Schedule,
    quality: "Quality | None" = None,
    wanted: Sequence[Reference] = (),
    simulated: Simulated | None = None,
) -> Summary:
    """Turn finished runs into the summary and the report of the run folder."""
    burst_end_s = facts.burst.end_s if facts.burst else facts.duration_s
    each = [summarise(run, request.slo, burst_end_s) for run in runs]
    groups = _groups(request, runs)
    policies = [pooled(*_of(group, runs, each)) for group in groups]
    mixes = _judge(quality, [*each, *policies], [*([run] for run in runs), *groups])
    for policy, group in zip(policies, groups, strict=True):
        policy.repeats = spread(_of(group, runs, each)[1])
    main = main_rate(request.rates)
    told = [p for p, group in zip(policies, groups, strict=True) if group[0].rate == main]
    at_main = [run for run in runs if run.rate == main]
    fill_answers(told, at_main, wanted)
    curve = [
        load_point(policy, len(group), facts.duration_s)
        for policy, group in zip(policies, groups, strict=True)
        if len(request.rates) > 1
    ]
    summary = Summary(
        settings=settings_of(request, simulated),
        environment=environment(),
        trace=facts,
        policies=told,
        perplexities=mixes,
        created=now(),
        runs=each if len(runs) > len(told) else [],
        curve=curve,
        served_by=sorted(
            {
                f"{state.kernels} kernels on {state.device}"
                for run in runs
                for state in run.states
                if state.device
            }
        ),
        notes=list(
            dict.fromkeys([*(n for r in runs for n in r.notes), *invalid_loads(curve, main)])
        ),
    )
    write_summary(request.output, summary)
    write_report(request.output, summary, runs, schedule)
    return summary


def _groups(request: BenchRequest, runs: Sequence[Run]) -> list[list[Run]]:
    """Repeats of the same run together, in the order of rates and policies."""
    wanted = ((rate, policy) for rate in request.rates for policy in request.policies)
    found = [[r for r in runs if (r.rate, r.policy) == key] for key in wanted]
    return [group for group in found if group]


def _of(
    group: Sequence[Run], runs: Sequence[Run], each: Sequence[PolicySummary]
) -> tuple[Sequence[Run], list[PolicySummary]]:
    """The runs of a group with their summaries."""
    return group, [s for run, s in zip(runs, each, strict=True) if any(run is r for r in group)]


def _judge(
    quality: "Quality | None", summaries: Sequence[PolicySummary], runs: Sequence[Sequence[Run]]
) -> list[MixPerplexity]:
    if quality is None:
        return []
    served = [sum((Counter(tokens_per_mix(r.states)) for r in of), Counter()) for of in runs]
    return quality.judge(summaries, served)


def settings_of(request: BenchRequest, simulated: Simulated | None = None) -> Settings:
    """What was asked for, as the run folder tells it."""
    return Settings(
        trace=request.trace.name,
        shape=request.shape,
        prompts=str(request.prompts) if request.prompts else None,
        references=str(request.references) if request.references else None,
        model=request.model,
        bundle=str(request.bundle) if request.bundle else None,
        memory_budget=request.memory_budget,
        max_model_len=request.max_model_len,
        url=request.url,
        policies=request.policies,
        slo=request.slo,
        timeout_s=request.timeout_s,
        repeat=request.repeat,
        rates=request.rates,
        device=request.device,
        simulated=simulated,
        reading=request.reading,
    )
