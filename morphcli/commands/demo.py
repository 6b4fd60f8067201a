"""`morph demo`: the whole mission on one machine, with no download."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from morphserve.morphcli.bench.demo import DemoSettings


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the bundle, figures and report.")
    ] = Path("demo-run"),
) -> None:
    """Show morphing under a burst; takes a few minutes."""
    from rich.console import Console

    from morphserve.morphcli.bench.demo import (
        WINDOW_S,
        DemoSettings,
        demo_budget,
        demo_request,
        fit_load,
    )
    from morphserve.morphcli.bench.record import REPORT
    from morphserve.morphcli.bench.run import run_bench
    from morphserve.morphcli.bench.terminal import print_table
    from morphserve.morphcli.bench.verdict import verdict

    settings, console = DemoSettings(), Console(highlight=False)
    bundle = _prepare(output, settings, console)
    budget = demo_budget(settings, bundle)
    settings = fit_load(settings, bundle, budget)
    start_s, end_s = WINDOW_S
    console.print(
        f"{end_s - start_s:g} seconds of real traffic, shortened and scaled until it presses this "
        f"machine, against three servers of {budget} each: full precision, INT4 all the time, and "
        "morph"
    )
    summary = run_bench(demo_request(settings, output, bundle, budget), console)
    console.print()
    print_table(summary, console, details=False)
    if found := verdict(summary):
        console.print("\n".join(found.sentences), markup=False)
    report = f"\nreport, second by second: {output / REPORT}"
    console.print(report, markup=False, soft_wrap=True)
    command = ["morph", "serve", "demo", "--bundle", str(bundle), "--memory-budget", budget]
    command += ["--max-model-len", str(settings.max_model_len)]
    console.print(f"try: {shlex.join(command)}", markup=False, soft_wrap=True)


def _prepare(output: Path, settings: "DemoSettings", console: "Console") -> Path:
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from morphserve.morphcli.bench.demo import prepare_bundle

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=28), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done)

        return prepare_bundle(output / "demo.morph", settings, show)
