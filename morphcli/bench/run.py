"""A whole comparison: from a trace file to the run folder and its report."""

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import structs
from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID

from morphserve.configs.load import resolve_model
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.compare import Bench, run_policy
from morphserve.morphcli.bench.conclude import conclude, facts_of, settings_of
from morphserve.morphcli.bench.prompts import Prompts, load_corpus, load_tokenizer, make_prompts
from morphserve.morphcli.bench.quality import Quality, open_quality
from morphserve.morphcli.bench.record import (
    Summary,
    append_run,
    open_record,
    write_config,
)
from morphserve.morphcli.bench.references import (
    Reference,
    load_references,
    longest_prompt,
    pair_references,
)
from morphserve.morphcli.bench.request import BenchRequest, jobs_of, main_rate
from morphserve.morphcli.bench.server import ServerOptions, ended_by_signals
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.bench.terminal import request_progress
from morphserve.morphcli.traces.arrivals import Trace
from morphserve.morphcli.traces.readers import read_trace
from morphserve.morphcli.traces.schedule import Schedule, shape_trace

_SETTLE_S = 30.0  # longest wait for full precision after the last answer


def run_bench(request: BenchRequest, console: Console) -> Summary:
    """Replay the trace under each policy, write the run folder, and return its summary.

    Everything that can be checked is checked before the first server starts.
    """
    trace = read_trace(request.trace, request.reading)
    if skipped := trace.describe_bad_rows():
        console.print(f"[yellow]warning:[/] {escape(skipped)}", highlight=False)
    loads = {rate: _load(request, trace, rate) for rate in request.rates}
    quality = _quality(request)
    main = loads[main_rate(request.rates)]
    facts = facts_of(main.bench.schedule, main.bench.prompts.num_token_ids, skipped)
    open_record(request.output, force=request.force)
    write_config(request.output, settings_of(request))
    with ended_by_signals():
        runs = _run_all(request, loads, console)
    if quality is not None:
        console.print("measuring the quality of what was served")
    return conclude(request, facts, runs, main.bench.schedule, quality, main.wanted)


@dataclass(frozen=True, slots=True)
class _Load:
    """What is sent at one rate of a sweep."""

    bench: Bench
    wanted: list[Reference]


def _load(request: BenchRequest, trace: Trace, rate: float) -> _Load:
    wanted, prompts, schedule = _prompts(request, shape_trace(trace, request.shape.at(rate)))
    return _Load(_bench(request, schedule, prompts), wanted)


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
    options = ServerOptions(
        folder, request.bundle, request.memory_budget, request.max_model_len, request.device
    )
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


def _run_all(request: BenchRequest, loads: Mapping[float, _Load], console: Console) -> list[Run]:
    runs: list[Run] = []
    jobs = jobs_of(request)
    with request_progress(console) as progress:
        for number, job in enumerate(jobs, 1):
            bench = loads[job.rate].bench
            count = f"{number}/{len(jobs)} " if len(jobs) > len(request.policies) else ""
            title, total = f"{count}{job.title:<16}", len(bench.schedule.arrivals)
            task = progress.add_task(title, total=total)

            def advance(_: Outcome, task: TaskID = task) -> None:
                progress.advance(task)

            try:
                run = run_policy(bench, job.policy, advance, job.name)
            except KeyboardInterrupt:
                progress.console.print(
                    f"{len(runs)} of {len(jobs)} runs were finished; their requests and states "
                    f"are in {request.output}"
                )
                raise
            runs.append(structs.replace(run, repeat=job.repeat, rate=job.rate))
            append_run(request.output, runs[-1])
            progress.stop_task(task)
    return runs
