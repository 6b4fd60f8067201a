"""The `morph` command: which commands there are, and how errors reach the user."""

import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from morphserve.configs.errors import MorphError
from morphserve.configs.version import version
from morphserve.morphcli.commands.bench import bench
from morphserve.morphcli.commands.chat import chat
from morphserve.morphcli.commands.complete import complete
from morphserve.morphcli.commands.demo import demo
from morphserve.morphcli.commands.doctor import doctor
from morphserve.morphcli.commands.export import export
from morphserve.morphcli.commands.inspect_bundle import inspect
from morphserve.morphcli.commands.plan import plan
from morphserve.morphcli.commands.profile import profile
from morphserve.morphcli.commands.quantize import quantize
from morphserve.morphcli.commands.serve import serve
from morphserve.morphcli.commands.top import top
from morphserve.morphcli.commands.trace import trace
from morphserve.morphcli.commands.verify_bundle import verify
from morphserve.morphcli.settings import Command, misspelt
from morphserve.quantize.cores import cpu_quota, default_threads

app = typer.Typer(
    name="morph",
    help="Serve an LLM at full precision; under pressure swap layers for INT4 and grow the cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help takes three times as long as all the rest of --help
)
COMMANDS = (
    *(profile, quantize, inspect, verify, export),
    *(serve, top, chat, complete),
    *(bench, plan, demo, doctor),
)
for command in COMMANDS:
    app.command(cls=Command)(command)
app.add_typer(trace)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"morph {version()}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Version."),
    ] = False,
) -> None:
    for name, meant in misspelt(os.environ, _leaves(ctx.command)).items():
        typer.echo(f"warning: {name} is no setting of morph: did you mean {meant}?", err=True)


def _leaves(command: Any) -> Iterator[Any]:
    """The commands below a group, and those of the groups in it."""
    for each in command.commands.values():
        yield from _leaves(each) if hasattr(each, "commands") else [each]


def main() -> None:
    """Entry point: a MorphError becomes one sentence and its exit code.

    typer itself ends with code 130, without a traceback, on Ctrl-C.
    """
    # Both are read when torch loads, and the kernels take as many threads as torch: by itself it
    # counts cores whose time a control group does not grant. Threads that spin while they wait take
    # the cores from other programs, and from each other where there are fewer cores than threads:
    # tenfold times were measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(default_threads(cpu_quota())))
    try:
        app()
    except MorphError as error:
        _print_error(str(error))
        sys.exit(error.exit_code)


def _print_error(message: str) -> None:
    """One line on stderr; the message may hold brackets, which are not markup here."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False)
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
