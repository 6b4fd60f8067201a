"""`morph serve`: a model behind an OpenAI-compatible API, morphing under pressure."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from morphserve.configs.schema import CacheConfig, SchedulerConfig


def serve(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, or demo.")],
    dtype: Annotated[
        str, typer.Option(help="Of weights and KV cache: auto, float32, bfloat16.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads.")] = None,
    kernels: Annotated[str, typer.Option(help="cpu, or reference (plain torch).")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of requests that bring none.")] = 0,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="For weights and KV cache, as 96MiB."),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per KV block.")] = 16,
    max_num_seqs: Annotated[int, typer.Option(help="Requests running at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 512,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of a request, prompt and output."),
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
    """Serve a model; under pressure its layers become INT4 and the freed memory KV cache."""
    from morphserve.configs.load import load_policy, resolve_model
    from morphserve.configs.schema import EngineConfig, ServerConfig
    from morphserve.morphcli.monitor import choose_watch
    from morphserve.runtime.server.run import run_server

    engine = EngineConfig(
        model=str(resolve_model(model)),
        policy=load_policy(policy),
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
        shutdown_timeout_s=shutdown_timeout,
        log_interval_s=log_interval,
    )
    raise typer.Exit(run_server(engine, server, choose_watch(no_monitor, log_interval)))


def _cache(memory_budget: str | None, block_size: int) -> "CacheConfig":
    from morphserve.configs.load import parse_bytes
    from morphserve.configs.schema import CacheConfig

    budget = None if memory_budget is None else parse_bytes(memory_budget)
    return CacheConfig(block_tokens=block_size, memory_budget=budget)


def _scheduler(seqs: int, tokens: int, length: int | None) -> "SchedulerConfig":
    from morphserve.configs.schema import SchedulerConfig

    return SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length)
