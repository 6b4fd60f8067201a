"""A whole comparison: from a trace file to the run folder and its report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from morphserve.configs.errors import ConfigError, MorphError
from morphserve.configs.load import resolve_model
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.compare import Bench, agreement, run_policy
from morphserve.morphcli.bench.prompts import Prompts, load_corpus, load_tokenizer, make_prompts
from morphserve.morphcli.bench.quality import Quality, open_quality
from morphserve.morphcli.bench.record import (
    Settings,
    Summary,
    TraceFacts,
    environment,
    now,
    trace_facts,
    write_record,
)
from morphserve.morphcli.bench.report import render_report
from morphserve.morphcli.bench.schedule import Schedule, Shape, find_burst, shape_trace
from morphserve.morphcli.bench.server import ServerOptions
from morphserve.morphcli.bench.summary import Run, Slo, mean_perplexity, summarise, tokens_per_level
from morphserve.morphcli.bench.table import policy_title, table_rows
from morphserve.morphcli.bench.traces import read_azure

REPORT = "report.html"
_SETTLE_S = 30.0  # longest wait for full precision after the last answer


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What `morph bench` was asked for."""

    model: str  # folder, or demo
    trace: Path
    shape: Shape
    policies: tuple[str, ...]
    slo: Slo
    output: Path  # folder; made if missing
    bundle: Path | None = None
    memory_budget: str | None = None
    max_model_len: int | None = None
    prompts: Path | None = None  # text file; None: the model folder's held-out text
    url: str | None = None  # a running server; None: start one per policy
    timeout_s: float = 120.0  # per request

    def __post_init__(self) -> None:
        needs_bundle = [name for name in self.policies if name != "full"]
        if self.url is None and self.bundle is None and needs_bundle:
            raise ConfigError(
                f"{', '.join(needs_bundle)} needs INT4 layers: give --bundle, made by "
                f"`morph quantize {self.model}`"
            )


def run_bench(request: BenchRequest, console: Console) -> Summary:
    """Replay the trace under each policy, write the run folder, and return its summary.

    Everything that can be checked is checked before the first server starts.
    """
    trace = read_azure(request.trace)
    schedule = shape_trace(trace, request.shape)
    if skipped := trace.describe_bad_rows():
        console.print(f"[yellow]warning:[/] {skipped}", highlight=False)
    prompts = _prompts(request, schedule)
    quality = open_quality(request.model, request.bundle, request.prompts)
    burst = find_burst(schedule.arrivals, schedule.duration_s)
    facts = trace_facts(schedule, prompts.num_token_ids, skipped, burst)
    runs = _run_all(_bench(request, schedule, prompts), console)
    console.print("measuring the perplexity of what was served")
    summary = _summary(request, facts, runs, quality)
    write_record(request.output, summary, runs)
    report = render_report(summary, runs, schedule)
    (request.output / REPORT).write_text(report, "utf-8")
    return summary


def _prompts(request: BenchRequest, schedule: Schedule) -> Prompts:
    folder = resolve_model(request.model)
    corpus = load_corpus(folder, request.prompts)
    lengths = [arrival.prompt_tokens for arrival in schedule.arrivals]
    return make_prompts(load_tokenizer(folder), corpus, lengths, request.shape.seed)


def _bench(request: BenchRequest, schedule: Schedule, prompts: Prompts) -> Bench:
    try:
        request.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MorphError(f"cannot write to {request.output}: {error.strerror}") from error
    folder = resolve_model(request.model)
    options = ServerOptions(folder, request.bundle, request.memory_budget, request.max_model_len)
    return Bench(
        policies=request.policies,
        schedule=schedule,
        prompts=prompts,
        timeout_s=request.timeout_s,
        settle_s=_SETTLE_S,
        output=request.output,
        servers=None if request.url else options,
        url=request.url,
    )


def _run_all(bench: Bench, console: Console) -> list[Run]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeElapsedColumn(),
    )
    runs = []
    with Progress(*columns, console=console) as progress:
        total = len(bench.schedule.arrivals)
        tasks = {
            policy: progress.add_task(f"{policy_title(policy):<16}", total=total, start=False)
            for policy in bench.policies
        }
        for policy, task in tasks.items():
            progress.start_task(task)

            def advance(_: Outcome, task: TaskID = task) -> None:
                progress.advance(task)

            runs.append(run_policy(bench, policy, advance))
            progress.stop_task(task)
    return runs


def _summary(
    request: BenchRequest, facts: TraceFacts, runs: Sequence[Run], quality: Quality
) -> Summary:
    burst_end_s = facts.burst.end_s if facts.burst else facts.duration_s
    policies = [summarise(run, request.slo, burst_end_s) for run in runs]
    served = [tokens_per_level(run.states) for run in runs]
    perplexities = quality.perplexities({0}.union(*served))
    for policy, tokens in zip(policies, served, strict=True):
        policy.perplexity = mean_perplexity(tokens, perplexities)
    same = {run.policy: agreement(runs[0].outcomes, run.outcomes) for run in runs[1:]}
    return Summary(
        settings=_settings(request),
        environment=environment(),
        trace=facts,
        policies=policies,
        perplexities=perplexities,
        same_text_as_first={name: share for name, share in same.items() if share is not None},
        created=now(),
    )


def _settings(request: BenchRequest) -> Settings:
    shape = request.shape
    return Settings(
        trace=request.trace.name,
        window_s=shape.window_s,
        rate_scale=shape.rate_scale,
        time_scale=shape.time_scale,
        length_scale=shape.length_scale,
        max_prompt=shape.max_prompt,
        max_output=shape.max_output,
        seed=shape.seed,
        model=request.model,
        bundle=str(request.bundle) if request.bundle else None,
        memory_budget=request.memory_budget,
        max_model_len=request.max_model_len,
        url=request.url,
        policies=request.policies,
        slo=request.slo,
        timeout_s=request.timeout_s,
    )


def print_table(summary: Summary, console: Console, *, details: bool) -> None:
    """The headline table; the best cell of a row is green."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("", min_width=28)
    for policy in summary.policies:
        table.add_column(policy_title(policy.policy), justify="right")
    for row in table_rows(summary):
        if details or not row.is_detail:
            cells = (f"[green]{c}[/]" if i == row.best else c for i, c in enumerate(row.cells))
            table.add_row(row.label, *cells)
    console.print(table)
