"""Hand-made runs of a benchmark."""

from morphserve.configs.schema import Slo
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.drawings import draw_all
from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.record import (
    Environment,
    MixPerplexity,
    Settings,
    Summary,
    trace_facts,
)
from morphserve.morphcli.bench.report import render_report
from morphserve.morphcli.bench.server import State
from morphserve.morphcli.bench.summary import Run, summarise
from morphserve.morphcli.traces.arrivals import Arrival
from morphserve.morphcli.traces.schedule import Burst, Schedule, Shape
from morphserve.quantize.manifest import Rung, Variant

SLO = Slo(ttft_s=1.0, tpot_s=0.1)
LADDER = [Rung(layer, Variant.INT4) for layer in range(4)]
BURST = Burst(start_s=1.0, end_s=2.0, usual_rate=1.0, peak_rate=7.0)


def answered(index: int, ttft_s: float, tpot_s: float = 0.05, tokens: int = 11) -> Outcome:
    """A request sent at second `index` and answered to the end."""
    return Outcome(
        index,
        intended_s=float(index),
        sent_s=index + 0.001,
        prompt_tokens=8,
        max_tokens=tokens,
        status=200,
        finish_reason="length",
        ttft_s=ttft_s,
        e2e_s=ttft_s + tpot_s * (tokens - 1),
        output_tokens=tokens,
        text_sha256=f"text {index}",
    )


def unanswered(index: int, status: int = 0, timed_out: bool = False) -> Outcome:
    error = "refused <with> 503" if status else "unfinished" if timed_out else "broken"
    return Outcome(
        index, float(index), index + 0.001, 8, 11, status, error=error, timed_out=timed_out
    )


def state(at_s: float, num_int4: int, tokens: int, preemptions: int = 0) -> State:
    """Of a server with 4 layers, read `at_s` seconds after second 0; 100 is the wall clock."""
    return State(
        time=100 + at_s,
        layers=[Variant.INT4 if i < num_int4 else Variant.FULL for i in range(4)],
        blocks_used=5,
        blocks_capacity=10 + 2 * num_int4,
        blocks_full=10,
        block_tokens=16,
        running=2,
        waiting=1,
        preemptions=preemptions,
        generated_tokens={Variant.FULL: tokens - tokens // 2, Variant.INT4: tokens // 2},
        swaps=0,
        ladder=LADDER,
    )


def make_run(policy: str, outcomes: list[Outcome], states: list[State]) -> Run:
    return Run(policy, 100.0, outcomes, states)


def page_of(summary: Summary, runs: list[Run], schedule: Schedule) -> str:
    """The report's page."""
    return render_report(summary, runs, draw_all(summary, runs, schedule))


def make_summary(runs: list[Run]) -> tuple[Summary, Schedule]:
    """A summary of runs that offered the same requests."""
    arrivals = tuple(Arrival(o.intended_s, 8, 11) for o in runs[0].outcomes)
    schedule = Schedule(arrivals, 5.0)
    policies: list[PolicySummary] = [summarise(run, SLO, BURST.end_s) for run in runs]
    names = tuple(run.policy for run in runs)
    summary = Summary(
        settings=Settings(
            "t.csv", Shape(length_scale=0.1, output_scale=10.0), None, "demo", None, "9MiB", None,
            None, names, SLO, 30.0,
        ),
        environment=Environment("0", None, "3", "2", "linux", "a <fast> cpu", 2),
        trace=trace_facts(schedule, 0, "", BURST),
        policies=policies,
        perplexities=[
            MixPerplexity([Variant.FULL] * 4, 10.0),
            MixPerplexity([Variant.INT4] * 4, 11.0),
        ],
        created="now",
    )  # fmt: skip
    return summary, schedule
