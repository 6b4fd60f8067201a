"""`morph bench --kernels` as the command line has it."""

from typing import TYPE_CHECKING

import typer

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.settings import is_on_command_line

if TYPE_CHECKING:
    from morphserve.morphcli.bench.kernels.result import KernelBench

_TAKES = ("time_kernels", "threads", "json")
_OF_SERVE = ("auto", "reference")  # what `morph serve --kernels` takes


def time_and_print(ctx: typer.Context, threads: int | None, *, as_json: bool) -> None:
    """Times everything; prints tables, or one JSON document."""
    from rich.console import Console

    _refuse_others(ctx)
    bench = _timed(threads)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(bench)).decode())
    else:
        from morphserve.morphcli.bench.kernels.tables import print_bench

        print_bench(bench, Console())


def _refuse_others(ctx: typer.Context) -> None:
    """What is about models, traces or servers means nothing here."""
    model = ctx.params["model"]
    if model in _OF_SERVE and is_on_command_line(ctx, "model"):
        raise ConfigError(
            f"--kernels takes a value in `morph serve` only: leave out {model}, as `morph bench` "
            "times the C kernels"
        )
    for param in ctx.command.params:
        assert param.name is not None
        if param.name not in _TAKES and is_on_command_line(ctx, param.name):
            given = param.opts[0] if param.param_type_name == "option" else param.name.upper()
            raise ConfigError(
                f"--kernels times this machine, with no model and no trace: leave out {given}, "
                "or leave out --kernels"
            )


def _timed(threads: int | None) -> "KernelBench":
    from rich.console import Console

    from morphserve.morphcli.bench.kernels.run import bench_kernels

    with Console(stderr=True).status("") as status:
        return bench_kernels(threads, status.update)
