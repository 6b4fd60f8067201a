"""`morph demo`: the whole mission on one machine, with no download."""

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
    """Show morphing on the shipped model under a burst of requests; takes a few minutes."""
    from rich.console import Console

    from morphserve.morphcli.bench.demo import DemoSettings, demo_budget, demo_request
    from morphserve.morphcli.bench.run import REPORT, print_table, run_bench
    from morphserve.morphcli.bench.verdict import verdict

    settings, console = DemoSettings(), Console(highlight=False)
    bundle = _prepare(output, settings, console)
    budget = demo_budget(settings, bundle)
    console.print(
        "one minute of real traffic, thinned and shortened, against three servers of "
        f"{budget} each: full precision, INT4 all the time, and morph"
    )
    summary = run_bench(demo_request(settings, output, bundle, budget), console)
    console.print()
    print_table(summary, console, details=False)
    if found := verdict(summary):
        console.print("\n".join(found.sentences))
    console.print(f"\nreport, second by second: {output / REPORT}", soft_wrap=True)
    console.print(
        f"try: morph serve demo --bundle {bundle} --memory-budget {budget} "
        f"--max-model-len {settings.max_model_len}",
        soft_wrap=True,
    )


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
