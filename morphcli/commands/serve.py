"""`morph serve`: a model behind an OpenAI-compatible API, morphing under pressure."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from morphserve.configs.schema import CacheConfig, Policy, SchedulerConfig


def serve(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, or demo.")],
    dtype: Annotated[
        str, typer.Option(help="Of weights and KV cache: auto, float32, bfloat16.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Compute threads. [default: one per core]")
    ] = None,
    kernels: Annotated[str, typer.Option(help="cpu, or reference (plain torch).")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of requests that bring none.")] = 0,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            help="For weights and KV cache, as 96MiB. [default: enough for --max-num-seqs]"
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per KV block.")] = 16,
    max_num_seqs: Annotated[int, typer.Option(help="Requests running at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 512,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Most tokens of a request, prompt and output. [default: the model's limit]"
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Folder made by `morph quantize`."),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="accuracy, balanced, performance, off, static:N, static:all or a .toml file.",
        ),
    ] = "balanced",
    order: Annotated[
        str,
        typer.Option(
            help="Layers to demote first: bundle (its ranking), front-to-back, back-to-front, "
            "random.",
        ),
    ] = "bundle",
    host: Annotated[str, typer.Option(help="127.0.0.1: this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name in the API. [default: the folder's]"),
    ] = None,
    max_num_queued_reqs: Annotated[
        int,
        typer.Option(min=1, help="Prompts in flight; further ones are answered with 503."),
    ] = 512,
    shutdown_timeout: Annotated[
        float,
        typer.Option(min=0, help="Seconds for running requests to finish."),
    ] = 30.0,
    log_interval: Annotated[float, typer.Option(min=0.1, help="Seconds between log lines.")] = 10.0,
    no_monitor: Annotated[
        bool,
        typer.Option("--no-monitor", help="Log lines, no live view."),
    ] = False,
) -> None:
    """Serve a model; under pressure layers become INT4."""
    from morphserve.configs.load import load_policy, resolve_model
    from morphserve.configs.schema import EngineConfig, ServerConfig
    from morphserve.morphcli.view import choose_watch
    from morphserve.runtime.server.run import run_server

    rules, folder = load_policy(policy), resolve_model(model)
    _check_folders(model, folder, bundle, rules)
    engine = EngineConfig(
        model=str(folder),
        policy=rules,
        bundle=None if bundle is None else str(bundle),
        kernels=kernels,
        dtype=dtype,
        threads=threads,
        order=order,
        seed=seed,
        cache=_cache(memory_budget, block_size),
        scheduler=_scheduler(max_num_seqs, max_num_batched_tokens, max_model_len),
    )
    server = ServerConfig(
        host=host,
        port=port,
        served_model_name=served_model_name or Path(model).resolve().name,
        max_queued=max_num_queued_reqs,
        shutdown_timeout_s=shutdown_timeout,
    )
    raise typer.Exit(run_server(engine, server, choose_watch(no_monitor, log_interval)))


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


def _cache(memory_budget: str | None, block_size: int) -> "CacheConfig":
    from morphserve.configs.load import parse_bytes
    from morphserve.configs.schema import CacheConfig

    budget = None if memory_budget is None else parse_bytes(memory_budget)
    return CacheConfig(block_tokens=block_size, memory_budget=budget)


def _scheduler(seqs: int, tokens: int, length: int | None) -> "SchedulerConfig":
    from morphserve.configs.schema import SchedulerConfig

    return SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length)
