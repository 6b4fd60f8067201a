"""A whole comparison: from a trace file to the run folder and its report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from morphserve.configs.errors import ConfigError
from morphserve.configs.load import resolve_model
from morphserve.configs.schema import Slo
from morphserve.morphcli.bench.answers import fill_answers
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.compare import Bench, agreement, run_policy
from morphserve.morphcli.bench.http import host_and_port
from morphserve.morphcli.bench.prompts import Prompts, load_corpus, load_tokenizer, make_prompts
from morphserve.morphcli.bench.quality import Quality, open_quality
from morphserve.morphcli.bench.record import (
    Settings,
    Simulated,
    Summary,
    TraceFacts,
    append_run,
    environment,
    now,
    open_record,
    trace_facts,
    write_summary,
)
from morphserve.morphcli.bench.references import (
    Reference,
    load_references,
    longest_prompt,
    pair_references,
)
from morphserve.morphcli.bench.report import write_report
from morphserve.morphcli.bench.server import ServerOptions, ended_by_signals
from morphserve.morphcli.bench.summary import Run, summarise, tokens_per_mix
from morphserve.morphcli.bench.table import policy_title, table_rows
from morphserve.morphcli.traces.readers import Reading, read_trace
from morphserve.morphcli.traces.schedule import Schedule, Shape, find_burst, shape_trace

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
    references: Path | None = None  # JSONL of prompts with what is right to answer
    url: str | None = None  # a running server; None: start one per policy
    api_key: str | None = field(default=None, repr=False)  # of that server
    timeout_s: float = 120.0  # per request
    reading: Reading = Reading()  # of the trace, beyond what its header tells
    force: bool = False  # replace a finished run in `output`
    is_simulated: bool = False  # no server is started

    def __post_init__(self) -> None:
        if self.url is not None:
            host_and_port(self.url)
        if self.url is not None or self.is_simulated:
            return
        needs_bundle = [name for name in self.policies if name != "full"]
        if self.bundle is None and needs_bundle:
            raise ConfigError(
                f"{', '.join(needs_bundle)} needs INT4 layers: give --bundle, made by "
                f"`morph quantize {self.model}`"
            )
        if self.memory_budget is None and len(self.policies) > 1:
            raise ConfigError(
                "give --memory-budget, as 96MiB: policies compare only where every server has the "
                "same memory"
            )


def run_bench(request: BenchRequest, console: Console) -> Summary:
    """Replay the trace under each policy, write the run folder, and return its summary.

    Everything that can be checked is checked before the first server starts.
    """
    trace = read_trace(request.trace, request.reading)
    schedule = shape_trace(trace, request.shape)
    if skipped := trace.describe_bad_rows():
        console.print(f"[yellow]warning:[/] {escape(skipped)}", highlight=False)
    wanted, prompts, schedule = _prompts(request, schedule)
    quality = _quality(request)
    burst = find_burst(schedule.arrivals, schedule.duration_s)
    facts = trace_facts(schedule, prompts.num_token_ids, skipped, burst)
    bench = _bench(request, schedule, prompts)
    open_record(request.output, force=request.force)
    with ended_by_signals():
        runs = _run_all(bench, console)
    if quality is not None:
        console.print("measuring the quality of what was served")
    return conclude(request, facts, runs, schedule, quality, wanted)


def conclude(
    request: BenchRequest,
    facts: TraceFacts,
    runs: Sequence[Run],
    schedule: Schedule,
    quality: Quality | None = None,
    wanted: Sequence[Reference] = (),
    simulated: Simulated | None = None,
) -> Summary:
    """Turn finished runs into the summary and the report of the run folder."""
    summary = _summary(request, facts, runs, quality, wanted)
    if simulated is not None:
        settings = msgspec.structs.replace(summary.settings, simulated=simulated)
        summary = msgspec.structs.replace(summary, settings=settings)
    write_summary(request.output, summary)
    write_report(request.output, summary, runs, schedule)
    return summary


def _quality(request: BenchRequest) -> Quality | None:
    """None for a server that runs already, unless it is known which bundle it serves."""
    if request.url is not None and request.bundle is None:
        return None
    return open_quality(request.model, request.bundle, request.prompts)


def _prompts(
    request: BenchRequest, schedule: Schedule
) -> tuple[list[Reference], Prompts, Schedule]:
    """What each request asks, with what is right to answer if that is known, and its length."""
    folder = resolve_model(request.model)
    seed = request.shape.seed
    if request.references is not None:
        references = load_references(request.references)
        most = longest_prompt(schedule, request.shape.max_prompt, request.max_model_len)
        return pair_references(references, load_tokenizer(folder), schedule, seed, most)
    corpus = load_corpus(folder, request.prompts)
    lengths = [arrival.prompt_tokens for arrival in schedule.arrivals]
    return [], make_prompts(load_tokenizer(folder), corpus, lengths, seed), schedule


def _bench(request: BenchRequest, schedule: Schedule, prompts: Prompts) -> Bench:
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
        api_key=request.api_key,
        graded=request.references is not None,
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
            append_run(bench.output, runs[-1])
            progress.stop_task(task)
    return runs


def _summary(
    request: BenchRequest,
    facts: TraceFacts,
    runs: Sequence[Run],
    quality: Quality | None,
    wanted: Sequence[Reference],
) -> Summary:
    burst_end_s = facts.burst.end_s if facts.burst else facts.duration_s
    policies = [summarise(run, request.slo, burst_end_s) for run in runs]
    served = [tokens_per_mix(run.states) for run in runs]
    perplexities = quality.judge(policies, served) if quality else []
    fill_answers(policies, runs, wanted)
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
