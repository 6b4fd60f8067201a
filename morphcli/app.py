"""The `morph` command: which commands there are, and how errors reach the user."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from morphserve.configs.errors import MorphError
from morphserve.morphcli.commands import bench, demo, profile, quantize, serve

app = typer.Typer(
    name="morph",
    help="Serve an LLM at full precision; under pressure swap layers for INT4 and grow the KV cache.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.command("profile")(profile.profile)
app.command("quantize")(quantize.quantize)
app.command("serve")(serve.serve)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"morph {version('morphserve')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a MorphError becomes one sentence and its exit code."""
    try:
        app()
    except MorphError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {error}")
        sys.exit(error.exit_code)
