"""`morph profile`: which layers to demote first."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import TaskID
    from rich.table import Table

    from morphserve.quantize.bundle import Bundle
    from morphserve.quantize.calibration import Windows
    from morphserve.quantize.checkpoint import Checkpoint
    from morphserve.quantize.manifest import RankedOrder, Ranking


def profile(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, or `demo`.")],
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="Made by `morph quantize`.")],
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file or folder; if not given, the held-out text of the model."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows to rank on, and as many to compare.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the choice of windows and the random order.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Rank the layers by how little INT4 changes the model.

    Ranks by LIS on the first half of the text; on the third quarter compares it with front-to-back,
    back-to-front and a random order. The order that stays closest to full precision is kept in
    the bundle.
    """
    import msgspec

    from morphserve.quantize.bundle import open_bundle
    from morphserve.quantize.calibration import Part, draw_windows
    from morphserve.quantize.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    opened = open_bundle(str(bundle), checkpoint)
    texts = (
        draw_windows(checkpoint, calibration, Part.CALIBRATION, samples, length, seed),
        draw_windows(checkpoint, calibration, Part.SELECTION, samples, length, seed),
    )
    ranking = _rank(checkpoint, opened, texts, seed, quiet=json)
    opened.with_ranking(ranking)
    if json:
        typer.echo(msgspec.json.encode(ranking).decode())
    else:
        _print(model, bundle, ranking)


def _rank(
    checkpoint: "Checkpoint",
    bundle: "Bundle",
    texts: "tuple[Windows, Windows]",
    seed: int,
    quiet: bool,
) -> "Ranking":
    from rich.console import Console
    from rich.progress import Progress

    from morphserve.profile.orders import rank

    with Progress(console=Console(stderr=True), disable=quiet) as progress:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done)

        return rank(checkpoint, bundle, *texts, seed, show)


def _print(model: str, bundle: Path, ranking: "Ranking") -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(_table("KL from full precision, 1e-3 nats/token", ranking, _divergences))
    console.print(_table("perplexity", ranking, _perplexities))
    sample = ranking.selection
    chosen = next(order for order in ranking.orders if order.name == ranking.chosen)
    console.print(
        f"{ranking.chosen} stays closest to full precision (lowest mean KL over "
        f"{sample.num_windows} windows of {sample.window_tokens} tokens, {sample.source}) and is "
        f"the bundle's order now: {' '.join(map(str, chosen.layers))}",
        markup=False,
    )
    command = shlex.join(["morph", "serve", model, "--bundle", str(bundle)])
    console.print(f"wrote {bundle}, try: {command}", markup=False)


def _table(title: str, ranking: "Ranking", cells: Callable[["RankedOrder"], list[str]]) -> "Table":
    from rich.table import Table

    table = Table(title=title)
    table.add_column("INT4 layers")
    for number in ranking.replaced:
        table.add_column(str(number), justify="right")
    for order in ranking.orders:
        style = "bold" if order.name == ranking.chosen else None
        table.add_row(order.name, *cells(order), style=style)
    return table


def _divergences(order: "RankedOrder") -> list[str]:
    return [f"{1e3 * value:.2f}" for value in order.divergence]


def _perplexities(order: "RankedOrder") -> list[str]:
    return [f"{value:.3f}" for value in order.perplexity]
