"""`morph plan`: how many GPUs a trace takes, at full precision, at INT4, and with morphing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from morphserve.morphcli.simulate.plan import Need, Plan


def plan(
    model: Annotated[
        str, typer.Argument(help="A name as llama-3-8b, or a folder with a config.json.")
    ],
    trace: Annotated[Path, typer.Option(help="CSV or JSON lines of requests.")],
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
        typer.Option(help="Most memory of a replica, as 20GiB. [default: 90 % of the device's]"),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share each layer.")] = 1,
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of a request. [default: the trace's longest]")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 512,
    window: Annotated[str | None, typer.Option(help="Seconds of the trace, as t:92-154.")] = None,
    rate_scale: Annotated[float, typer.Option(help="Requests per second times this.")] = 1.0,
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
    from morphserve.morphcli.simulate.plan import Plan, make_plan, usable_bytes
    from morphserve.morphcli.simulate.sizes import find_model
    from morphserve.morphcli.traces.readers import read_trace
    from morphserve.morphcli.traces.schedule import Shape, Window, parse_window, shape_trace

    names = parse_policies(policies)
    target = gpu_target(
        find_device(device), find_model(model), model, tensor_parallel=tensor_parallel
    )
    part = parse_window(window) if window else Window()
    shape = Shape(part.seconds, part.rows, rate_scale, seed=seed)
    schedule = shape_trace(read_trace(trace), shape)
    longest = max(a.prompt_tokens + a.output_tokens for a in schedule.arrivals)
    fleet = Fleet(
        target,
        router=router,
        cache=CacheConfig(memory_budget=parse_bytes(memory_budget) if memory_budget else None),
        limits=SchedulerConfig(
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len or min(longest, target.max_position),
        ),
        slo=parse_slo(slo),
    )
    console, needs = Console(stderr=True), []
    with console.status("simulating") as status:
        for need in make_plan(fleet, schedule, names, share, max_replicas):
            status.update(f"simulating, {need.policy} is done")
            needs.append(need)
    found = Plan(
        *(model, target.device, usable_bytes(fleet), router, len(schedule.arrivals)),
        *(schedule.duration_s, share, max_replicas, needs),
    )
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    _print(found, slo)


def _print(found: "Plan", slo: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.model} on {found.device}, {found.share:.4g} of requests at {slo}")
    table.add_column("policy", no_wrap=True)
    for column in ("replicas", "memory each", "within SLO", "TTFT P95", "TPOT P95", "INT4 tokens"):
        table.add_column(column, justify="right")
    for need in found.needs:
        table.add_row(*_cells(need, found.max_replicas))
    console = Console()
    console.print(table)
    console.print(
        f"{found.requests} requests in {found.duration_s:.0f} s, simulated behind a {found.router} "
        f"router; {found.device_bytes / 2**30:.1f} GiB of each replica may be used",
        highlight=False,
    )


def _cells(need: "Need", max_replicas: int) -> list[str]:
    from morphserve.morphcli.bench.summary import show_s
    from morphserve.morphcli.bench.table import policy_title

    ttft, tpot = (
        "–" if value is None else show_s(value) for value in (need.ttft_p95_s, need.tpot_p95_s)
    )
    demoted = need.demoted_token_share
    return [
        policy_title(need.policy),
        f"over {max_replicas}" if need.replicas is None else str(need.replicas),
        "–" if need.budget_bytes is None else f"{need.budget_bytes / 2**30:.1f} GiB",
        f"{need.met_share:.2%}",
        ttft,
        tpot,
        "–" if demoted is None else f"{demoted:.0%}",
    ]
