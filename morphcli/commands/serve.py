"""`morph serve`: a model behind an OpenAI-compatible API, morphing under pressure."""

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from morphserve.morphcli.settings import (
    is_on_command_line,
    keys_on_command_line,
    read_config,
    variable,
)

if TYPE_CHECKING:
    from morphserve.configs.schema import EngineConfig, Policy, ServerConfig

_MODEL, _MEMORY, _SCHEDULER, _MORPHING, _HTTP, _OBSERVABILITY = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Model", "Memory", "Scheduler", "Morphing", "HTTP", "Observability")
)


def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Hugging Face folder, or demo.")],
    served_model_name: Annotated[
        str | None, _MODEL(help="Name in the API. [default: the folder's]")
    ] = None,
    dtype: Annotated[
        str, _MODEL(help="Of weights and KV cache: auto, float32, bfloat16.")
    ] = "auto",
    threads: Annotated[
        int | None,
        _MODEL(
            min=1, help="Compute threads. [default: OMP_NUM_THREADS, else one per core it gets]"
        ),
    ] = None,
    device: Annotated[
        str, _MODEL(help="auto (a GPU if one can serve), cpu, cuda, cuda:1.")
    ] = "auto",
    kernels: Annotated[
        str, _MODEL(help="auto (the device's), or reference (plain torch).")
    ] = "auto",
    seed: Annotated[int, _MODEL(min=0, help="Of requests that bring none.")] = 0,
    memory_budget: Annotated[
        str | None,
        _MEMORY(
            help="For weights and KV cache, as 96MiB. [default: enough for --max-num-seqs; on a "
            "GPU what --gpu-memory-utilization leaves]"
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        _MEMORY(help="Share of a GPU's memory for all that serving takes. [default: 0.9]"),
    ] = None,
    max_model_len: Annotated[
        int | None,
        _MEMORY(
            min=2, help="Most tokens of a request, prompt and output. [default: the model's limit]"
        ),
    ] = None,
    enable_prefix_caching: Annotated[
        bool, _MEMORY(help="Keep KV blocks for prompts that begin alike.")
    ] = True,
    block_size: Annotated[
        int | None, _MEMORY(min=1, help="Tokens per KV block. [default: 16; on a GPU 32]")
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        _SCHEDULER(min=1, help="Requests running at once. [default: 64; on a GPU 256]"),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, _SCHEDULER(min=1, help="Tokens per step. [default: 512; on a GPU 2048]")
    ] = None,
    max_num_queued_reqs: Annotated[
        int, _SCHEDULER(min=1, help="Prompts that may wait beside the running ones.")
    ] = 512,
    max_num_queued_tokens: Annotated[
        int | None,
        _SCHEDULER(
            min=1,
            help="Prompt tokens that may wait. [default: prompt tokens for 8 KV caches of the "
            "deepest rung]",
        ),
    ] = None,
    queue_timeout: Annotated[
        float | None,
        _SCHEDULER(help="Seconds a request may wait, above 0. [default: no limit]"),
    ] = None,
    bundle: Annotated[Path | None, _MORPHING(help="Folder made by `morph quantize`.")] = None,
    policy: Annotated[
        str,
        _MORPHING(help="accuracy, balanced, performance, off, static:N, static:all, or a file."),
    ] = "balanced",
    slo: Annotated[
        str | None,
        _MORPHING(help="Targets of requests that bring none, as ttft=1s,tpot=100ms."),
    ] = None,
    order: Annotated[
        str,
        _MORPHING(
            help="Layers to demote first: bundle (its ranking), front-to-back, back-to-front, "
            "random."
        ),
    ] = "bundle",
    host: Annotated[str, _HTTP(help="127.0.0.1: this machine only.")] = "127.0.0.1",
    port: Annotated[int, _HTTP(min=0, max=65535, help="0: any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        _HTTP(metavar="KEY", help="Clients must send it; may be repeated. Better: MORPH_API_KEY."),
    ] = None,
    admin_key: Annotated[
        str | None,
        _HTTP(metavar="KEY", help="Allows to pin rungs over HTTP. Better: MORPH_ADMIN_KEY."),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        _HTTP(metavar="ORIGIN", help="Of web pages that may call; may be repeated; *: any."),
    ] = None,
    overload_status: Annotated[
        int, _HTTP(help="Of refusals when the queue is full: 503 or 429.")
    ] = 503,
    shutdown_timeout: Annotated[
        float, _HTTP(min=0, help="Seconds for running requests to finish.")
    ] = 30.0,
    engine_timeout: Annotated[
        float, _HTTP(min=1, help="Seconds without a word after which the engine is replaced.")
    ] = 300.0,
    log_interval: Annotated[
        float, _OBSERVABILITY(min=0.1, help="Seconds between log lines.")
    ] = 10.0,
    log_format: Annotated[str, _OBSERVABILITY(help="text, or json.")] = "text",
    no_monitor: Annotated[
        bool, _OBSERVABILITY("--no-monitor", help="Log lines, no live view.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True, callback=read_config, metavar="FILE", help="These options as TOML."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the memory plan, and what is set where.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --dry-run: as one document.")] = False,
) -> None:
    """Serve a model; under pressure layers become INT8 and INT4.

    A flag counts before its environment variable (MORPH_PORT for --port), that before --config.
    """
    from morphserve.configs.errors import ConfigError
    from morphserve.configs.load import load_policy, parse_bytes, parse_slo, resolve_model
    from morphserve.configs.schema import (
        CPU_DEFAULTS,
        CacheConfig,
        EngineConfig,
        SchedulerConfig,
        ServerConfig,
        Slo,
    )

    if is_on_command_line(ctx, "json") and not dry_run:
        raise ConfigError(
            "--json prints the memory plan: add --dry-run; a server's log has --log-format json"
        )
    rules, folder = load_policy(policy), resolve_model(model)
    _check_folders(model, folder, bundle, rules)
    engine = EngineConfig(
        model=str(folder),
        policy=rules,
        bundle=None if bundle is None else str(bundle),
        device=device,
        kernels=kernels,
        dtype=dtype,
        threads=threads,
        order=order,
        seed=seed,
        cache=CacheConfig(
            block_tokens=CPU_DEFAULTS.block_tokens if block_size is None else block_size,
            memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
        ),
        scheduler=SchedulerConfig(
            *CPU_DEFAULTS.limits(max_num_seqs, max_num_batched_tokens),
            max_model_len=max_model_len,
            queue_timeout_s=queue_timeout,
        ),
        slo=Slo() if slo is None else parse_slo(slo),
        unset=_unset(
            block_tokens=block_size,
            min_run_bytes=None,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        ),
    )
    server = ServerConfig(
        host=host,
        port=port,
        served_model_name=served_model_name or Path(model).resolve().name,
        max_queued=max_num_queued_reqs,
        max_queued_tokens=max_num_queued_tokens,
        overload_status=overload_status,
        engine_timeout_s=engine_timeout,
        shutdown_timeout_s=shutdown_timeout,
        log_format=log_format,
        api_keys=tuple(api_key or ()),
        admin_key=admin_key,
        allowed_origins=tuple(allowed_origins or ()),
    )
    for name in keys_on_command_line(ctx):
        _warn_of_key(name)
    if dry_run:
        return _show_plan(ctx, engine, json)
    from morphserve.morphcli.view import choose_watch
    from morphserve.runtime.server.run import run_server

    watch = choose_watch(no_monitor, log_interval, _keys_of(server))
    raise typer.Exit(run_server(engine, server, watch))


def _unset(**given: int | None) -> frozenset[str]:
    """The settings that nobody made, which are the device's to choose."""
    return frozenset(name for name, value in given.items() if value is None)


def _keys_of(server: "ServerConfig") -> dict[str, str]:
    """The environment in which the view may ask the server."""
    keys = {"MORPH_API_KEY": next(iter(server.api_keys), ""), "MORPH_ADMIN_KEY": server.admin_key}
    return {name: key for name, key in keys.items() if key}


def _warn_of_key(name: str) -> None:
    typer.echo(
        f"warning: others on this machine can see --{name.replace('_', '-')} in the list of "
        f"processes: set {variable(name)} instead",
        err=True,
    )


def _show_plan(ctx: typer.Context, engine: "EngineConfig", json: bool) -> None:
    from morphserve.morphcli.dry_run import show_plan
    from morphserve.morphcli.settings import given_settings

    show_plan(engine, list(given_settings(ctx)), json)


def _check_folders(model: str, folder: Path, bundle: Path | None, policy: "Policy") -> None:
    """Raises ConfigError with the commands that lead to a server, before anything is started."""
    from morphserve.configs.errors import ConfigError

    if not folder.is_dir():
        raise ConfigError(
            f"there is no model folder {folder}: give a Hugging Face folder, or `demo` for the "
            "shipped model"
        )
    name = shlex.quote(model)
    made = shlex.quote(str(bundle or f"{Path(model).name}.morph"))
    if bundle is not None and not bundle.is_dir():
        raise ConfigError(
            f"there is no bundle {bundle}: `morph quantize {name} -o {made}` makes it"
        )
    if bundle is None and policy.swaps:
        raise ConfigError(
            f"policy {policy.name} swaps layers and needs a bundle: `morph quantize {name} -o "
            f"{made}`, then `morph serve {name} --bundle {made}`; or serve at full precision with "
            "`--policy off`"
        )
