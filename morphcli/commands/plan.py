"""`morph plan`: how many GPUs a trace takes, at full precision, at INT4, and with morphing."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from morphserve.morphcli.traces.formats import parse_map
from morphserve.morphcli.traces.options import (
    Columns,
    LengthScale,
    MaxOutput,
    MaxPrompt,
    Part,
    RateScale,
    StampUnit,
    TraceFile,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from morphserve.morphcli.simulate.fleet import Fleet
    from morphserve.morphcli.simulate.plan import Need, Plan
    from morphserve.morphcli.traces.readers import Reading
    from morphserve.morphcli.traces.schedule import Schedule, Shape

_NONE = "–"
_MODELS = "codellama-34b, llama-2-7b, llama-3-70b, llama-3-8b, llama-3.1-8b, qwen2.5-7b, vicuna-7b"


def plan(
    model: Annotated[
        str, typer.Argument(help=f"A folder with a config.json, or a name: {_MODELS}.")
    ],
    trace: TraceFile,
    device: Annotated[str, typer.Option(help="l4, l40s, a100, a100-40, h100 or h200.")],
    slo: Annotated[str, typer.Option(help="Targets of a request.")] = "ttft=2s,tpot=100ms",
    share: Annotated[float, typer.Option(help="Of requests that must meet them.")] = 0.99,
    policies: Annotated[
        str, typer.Option(help="As in morph bench --compare.")
    ] = "full,static:all,morph",
    router: Annotated[
        str, typer.Option(help="round-robin, least-loaded or pressure-aware.")
    ] = "pressure-aware",
    max_replicas: Annotated[int, typer.Option(help="Most replicas to try.")] = 64,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Most memory of each device, as 20GiB. [default: 90 % of what it has]"),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share each layer.")] = 1,
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of a request. [default: the trace's longest]")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 512,
    map: Columns = None,
    time_unit: StampUnit = None,
    window: Part = None,
    rate_scale: RateScale = 1.0,
    length_scale: LengthScale = 1.0,
    max_prompt: MaxPrompt = None,
    max_output: MaxOutput = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Tell how many devices a trace needs to keep an SLO."""
    import msgspec
    from rich.console import Console

    from morphserve.configs.load import parse_bytes, parse_slo
    from morphserve.configs.schema import CacheConfig, SchedulerConfig
    from morphserve.morphcli.bench.compare import parse_policies
    from morphserve.morphcli.simulate.devices import find_device
    from morphserve.morphcli.simulate.fleet import Fleet
    from morphserve.morphcli.simulate.gpu import gpu_target
    from morphserve.morphcli.simulate.plan import make_plan, patience_s
    from morphserve.morphcli.simulate.sizes import find_model
    from morphserve.morphcli.traces.readers import Reading
    from morphserve.morphcli.traces.schedule import Shape, Window, parse_window

    console, names, target_slo = Console(stderr=True), parse_policies(policies), parse_slo(slo)
    target = gpu_target(
        find_device(device), find_model(model), model, tensor_parallel=tensor_parallel
    )
    part = parse_window(window) if window else Window()
    schedule = _schedule(
        trace,
        Reading(parse_map(map) if map else None, time_unit, seed=seed),
        Shape(
            window_s=part.seconds,
            window_rows=part.rows,
            rate_scale=rate_scale,
            length_scale=length_scale,
            max_prompt=max_prompt,
            max_output=max_output,
            seed=seed,
        ),
        console,
    )
    if max_model_len is None:
        longest = max(a.prompt_tokens + a.output_tokens for a in schedule.arrivals)
        max_model_len = min(longest, target.max_position)
    fleet = Fleet(
        target,
        router=router,
        cache=CacheConfig(memory_budget=parse_bytes(memory_budget) if memory_budget else None),
        limits=SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_model_len),
        slo=target_slo,
        timeout_s=patience_s(target_slo, schedule),
    )
    needs = []
    with console.status("simulating") as status:
        for need in make_plan(fleet, schedule, names, share, max_replicas):
            status.update(f"simulating, {need.policy} is done")
            needs.append(need)
    found = _plan(fleet, schedule, tensor_parallel, share, max_replicas, needs)
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    _print(found, Console())


def _schedule(trace: Path, reading: "Reading", shape: "Shape", console: "Console") -> "Schedule":
    from rich.markup import escape

    from morphserve.morphcli.traces.readers import read_trace
    from morphserve.morphcli.traces.schedule import shape_trace

    read = read_trace(trace, reading)
    if skipped := read.describe_bad_rows():
        console.print(f"[yellow]warning:[/] {escape(skipped)}", highlight=False)
    return shape_trace(read, shape)


def _plan(
    fleet: "Fleet",
    schedule: "Schedule",
    tensor_parallel: int,
    share: float,
    max_replicas: int,
    needs: "list[Need]",
) -> "Plan":
    from morphserve.morphcli.simulate.plan import Plan, usable_bytes

    return Plan(
        model=fleet.target.model,
        device=fleet.target.device,
        tensor_parallel=tensor_parallel,
        device_bytes=usable_bytes(fleet),
        router=fleet.router,
        limits=fleet.limits,
        requests=len(schedule.arrivals),
        clipped_prompts=schedule.clipped_prompts,
        clipped_outputs=schedule.clipped_outputs,
        duration_s=schedule.duration_s,
        timeout_s=fleet.timeout_s if math.isfinite(fleet.timeout_s) else None,
        slo=fleet.slo,
        share=share,
        max_replicas=max_replicas,
        needs=needs,
    )


def _print(found: "Plan", console: "Console") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from morphserve.morphcli.bench.summary import show_slo
    from morphserve.morphcli.bench.table import policy_title

    goal = f"{found.share * 100:.4g} % of requests: {show_slo(found.slo)}"
    title = f"{found.model} on {found.device}, {goal}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("policy")
    columns = _columns(found)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for need in found.needs:
        table.add_row(policy_title(need.policy), *(cell(need) for cell in columns.values()))
    console.print(table)
    console.print(_caption(found), highlight=False, markup=False)


def _columns(found: "Plan") -> "dict[str, Callable[[Need], str]]":
    from morphserve.morphcli.bench.summary import show_s

    def count(need: "Need", each: int) -> str:
        over = "over " if need.replicas is None else ""
        return f"{over}{each * (need.replicas or found.max_replicas)}"

    def share(value: float | None, digits: int) -> str:
        return _NONE if value is None else f"{value:.{digits}%}"

    def seconds(value: float | None) -> str:
        return _NONE if value is None else show_s(value)

    columns: dict[str, Callable[[Need], str]] = {"replicas": lambda need: count(need, 1)}
    if found.tensor_parallel > 1:
        columns["devices"] = lambda need: count(need, found.tensor_parallel)
    return columns | {
        "memory": lambda need: _NONE if need.budget_bytes is None else _gib(need.budget_bytes),
        "in SLO": lambda need: share(need.met_share, 2),
        "TTFT\nP95": lambda need: seconds(need.ttft_p95_s),
        "TPOT\nP95": lambda need: seconds(need.tpot_p95_s),
        "INT4\ntokens": lambda need: share(need.demoted_token_share, 0),
    }


def _caption(found: "Plan") -> str:
    limits, timeout_s = found.limits, found.timeout_s
    prompts, outputs = found.clipped_prompts, found.clipped_outputs
    cut = f" ({prompts} prompts and {outputs} outputs cut)" if prompts or outputs else ""
    end = "are never given up" if timeout_s is None else f"are given up after {timeout_s:.0f} s"
    return (
        f"{found.requests} requests in {found.duration_s:.0f} s{cut}, simulated behind a "
        f"{found.router} router. Memory is that of each device, of which "
        f"{_gib(found.device_bytes)} may be used. A replica runs at most {limits.max_num_seqs} "
        f"requests at once and {limits.max_num_batched_tokens} tokens a step; requests have at "
        f"most {limits.max_model_len} tokens, and {end}."
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
