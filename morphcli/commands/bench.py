"""`morph bench`: the same trace against several policies, told in one table and one report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from morphserve.morphcli.settings import first_key, is_on_command_line
from morphserve.morphcli.traces.formats import parse_map
from morphserve.morphcli.traces.options import (
    Columns,
    LengthScale,
    MaxOutput,
    MaxPrompt,
    Part,
    RateScale,
    StampUnit,
)

_COMPARE = "full,static:all,morph"
_SIMULATION = "Simulation"
_KERNELS = "Kernels"


def bench(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face folder, or demo; simulated, also llama-3-8b.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="CSV or JSON lines; docs/traces.md has the formats.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder made by `morph quantize`.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Memory for weights and KV cache, as 96MiB; every server's.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of a request, prompt and output.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Of the servers that it starts: auto, cpu, cuda, cuda:N.")
    ] = "auto",
    compare: Annotated[
        str | None,
        typer.Option(help=f"Policies, one after another. [default: {_COMPARE}]"),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Bench a running OpenAI-compatible server instead.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="If the server at --url wants one.")
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Start no server, but simulate one: here, l4, l40s, a100, a100-40, h100, h200.",
            rich_help_panel=_SIMULATION,
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(help="Servers behind a router. [default: 1]", rich_help_panel=_SIMULATION),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help="round-robin, least-loaded or pressure-aware. [default: least-loaded]",
            rich_help_panel=_SIMULATION,
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(help="GPUs that share each layer.", rich_help_panel=_SIMULATION),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            help="Most requests running at once. [default: 64]",
            rich_help_panel=_SIMULATION,
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens in a step. [default: 512]", rich_help_panel=_SIMULATION),
    ] = None,
    slowdown: Annotated[
        float | None,
        typer.Option(
            help="Steps take so many times what the cost model says. [default: 1]",
            rich_help_panel=_SIMULATION,
        ),
    ] = None,
    map: Columns = None,
    time_unit: StampUnit = None,
    window: Part = None,
    rate_scale: RateScale = 1.0,
    time_scale: Annotated[float, typer.Option(help="Seconds times this.")] = 1.0,
    length_scale: LengthScale = 1.0,
    output_scale: Annotated[
        float, typer.Option(help="Output tokens times this, on top of --length-scale.")
    ] = 1.0,
    max_prompt: MaxPrompt = None,
    max_output: MaxOutput = None,
    slo: Annotated[str, typer.Option(help="Targets of a request.")] = "ttft=2s,tpot=200ms",
    prompts: Annotated[
        Path | None, typer.Option(help="Text to cut prompts from. [default: the model's held-out]")
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(help="JSONL of prompts with right answers, to send and to grade."),
    ] = None,
    repeat: Annotated[
        int, typer.Option(help="Runs of each policy; figures then have confidence intervals.")
    ] = 1,
    rates: Annotated[
        str | None,
        typer.Option(metavar="0.5,1,2", help="Sweep over load: multiples of the request rate."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a request is given up.")
    ] = 120.0,
    assertions: Annotated[
        list[str] | None,
        typer.Option(
            "--assert",
            metavar="[POLICY.]FIGURE>=NUMBER",
            help="Exit with 1 unless it holds, as morph.slo_attainment>=0.95. May be repeated.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of sampling, prompts and the order of runs.")
    ] = 0,
    time_kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Replay nothing, but time this machine, its kernels and whole steps.",
            rich_help_panel=_KERNELS,
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of --kernels. [default: OMP_NUM_THREADS, else one per core it gets]",
            rich_help_panel=_KERNELS,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/bench"),
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the figures on stdout.")] = False,
) -> None:
    """Replay a trace against several policies, and compare."""
    from rich.console import Console

    from morphserve.configs.errors import ConfigError
    from morphserve.configs.load import parse_slo
    from morphserve.morphcli.bench.assertions import broken, parse_assertions
    from morphserve.morphcli.bench.compare import parse_policies
    from morphserve.morphcli.bench.kernels.command import time_and_print
    from morphserve.morphcli.bench.record import REPORT
    from morphserve.morphcli.bench.request import BenchRequest, parse_rates
    from morphserve.morphcli.bench.terminal import print_summary
    from morphserve.morphcli.bench.verdict import verdict
    from morphserve.morphcli.traces.readers import Reading
    from morphserve.morphcli.traces.schedule import Shape, Window, parse_window

    if time_kernels:
        return time_and_print(ctx, threads, as_json=json)
    if is_on_command_line(ctx, "threads"):
        raise ConfigError("--threads is for --kernels: leave it out")
    if model is None or trace is None:
        raise ConfigError(
            "name a model and a trace, as `morph bench MODEL --trace FILE`, or give --kernels"
        )
    if is_on_command_line(ctx, "device") and (url is not None or simulate is not None):
        raise ConfigError("--device is of servers that `morph bench` starts: leave it out")
    if url is not None and compare is not None:
        raise ConfigError("--compare starts servers of its own: leave it out with --url")
    simulation: dict[str, Any] = {
        "replicas": replicas,
        "router": router,
        "tensor_parallel": tensor_parallel,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "slowdown": slowdown,
    }
    simulation = {name: value for name, value in simulation.items() if value is not None}
    served = {"--url": url, "--api-key": api_key, "--prompts": prompts, "--references": references}
    _check_simulation(simulate, simulation, [name for name, given in served.items() if given])
    part = parse_window(window) if window else Window()
    request = BenchRequest(
        model=model,
        trace=trace,
        reading=Reading(parse_map(map) if map else None, time_unit, seed=seed),
        shape=Shape(
            window_s=part.seconds,
            window_rows=part.rows,
            rate_scale=rate_scale,
            time_scale=time_scale,
            length_scale=length_scale,
            output_scale=output_scale,
            max_prompt=max_prompt,
            max_output=max_output,
            seed=seed,
        ),
        policies=("server",) if url else parse_policies(compare or _COMPARE),
        slo=parse_slo(slo),
        output=output,
        bundle=bundle,
        memory_budget=memory_budget,
        max_model_len=max_model_len,
        device=device,
        prompts=prompts,
        references=references,
        url=url,
        api_key=first_key(api_key) if url else None,
        force=force,
        is_simulated=simulate is not None,
        repeat=repeat,
        rates=parse_rates(rates) if rates else (1.0,),
        timeout_s=timeout,
    )
    wanted = parse_assertions(assertions or [], request.policies)
    console = Console(stderr=True)
    if simulate is None:
        from morphserve.morphcli.bench.run import run_bench

        summary = run_bench(request, console)
    else:
        from morphserve.morphcli.simulate.bench import Setup, simulate_bench

        summary = simulate_bench(request, Setup(simulate, **simulation), console)
    found = verdict(summary)
    if json:
        if any(policy.faults for policy in summary.policies) and found:
            console.print(*found.sentences, sep="\n", highlight=False, markup=False)
        typer.echo((output / "summary.json").read_text("utf-8"), nl=False)
    else:
        print_summary(summary, found, Console())
        done = f"wrote {output}, open: {output / REPORT}"
        Console().print(done, highlight=False, markup=False, soft_wrap=True)
    if failures := list(broken(summary, wanted)):
        console.print(*failures, sep="\n", style="red", highlight=False, markup=False)
        raise typer.Exit(1)


def _check_simulation(
    simulate: str | None, simulation: dict[str, Any], served: Sequence[str]
) -> None:
    """No option is passed over in silence."""
    from morphserve.configs.errors import ConfigError

    if simulate is None and simulation:
        name = next(iter(simulation)).replace("_", "-")
        raise ConfigError(f"--{name} is for --simulate: leave it out, or name a device")
    if simulate is not None and served:
        raise ConfigError(f"--simulate stands in for servers: leave out {served[0]}")
