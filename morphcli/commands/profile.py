"""`morph profile`: which layers to demote first."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

    from morphserve.profile.orders import RankSettings
    from morphserve.profile.ranking import Texts
    from morphserve.profile.result import Profile, Study
    from morphserve.quantize.bundle import Bundle
    from morphserve.quantize.checkpoint import Checkpoint
    from morphserve.quantize.costs import DeviceCosts
    from morphserve.quantize.manifest import LisSettings, RankedOrder, Ranking
    from morphserve.runtime.device import Device


def profile(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, or `demo`.")],
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="Made by `morph quantize`.")],
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file or folder; if not given, the held-out text of the model."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of each of the three texts.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    orders: Annotated[
        str, typer.Option(help="What to compare, with commas between.")
    ] = "lis,kl-per-byte,front-to-back,back-to-front,random",
    seeds: Annotated[int, typer.Option(help="Number of random orders: random-0, ...")] = 5,
    lis_weights: Annotated[str, typer.Option(help="Of LTS, LRS and MDS in LIS.")] = "0.25,0.25,0.5",
    distance: Annotated[str, typer.Option(help="In LIS: cosine or l2.")] = "cosine",
    independence: Annotated[
        bool, typer.Option("--independence", help="Also: does a layer cost the same among others?")
    ] = False,
    positions: Annotated[
        bool, typer.Option("--positions", help="Also: INT4 early or late in a request?")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Folder of the report; the bundle's own if not given.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads that serving has. [default: OMP_NUM_THREADS, else one per core it gets]",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="To time layers on: auto, cpu, cuda, cuda:1, as for morph serve.")
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Order the layers by how little INT4 changes the model.

    Layers are scored on the first half of the text; the third quarter chooses the order that
    stays closest to full precision, which the bundle keeps; the last quarter is what the report
    tells of. Times layers on the device that serves too. Writes profile.html, .svg, .png and .json.
    """
    import msgspec

    from morphserve.profile.orders import RankSettings
    from morphserve.profile.ranking import draw_texts
    from morphserve.profile.report import make_folder
    from morphserve.profile.result import Study
    from morphserve.quantize.bundle import open_bundle
    from morphserve.quantize.checkpoint import open_checkpoint
    from morphserve.runtime.device import open_device

    serves = open_device(device)
    names = [name for entry in orders.split(",") if (name := entry.strip())]
    settings = RankSettings(names, seeds, _lis_settings(lis_weights, distance))
    wanted = {Study.INDEPENDENCE: independence, Study.POSITIONS: positions}
    checkpoint = open_checkpoint(model)
    opened = open_bundle(str(bundle), checkpoint)
    texts = draw_texts(checkpoint, calibration, samples, length, seed)
    studies = [study for study in Study if wanted[study]]
    make_folder(report or opened.path)  # before all the measuring
    found = _measure(checkpoint, opened, texts, settings, studies, quiet=json)
    page = _keep(found, opened, report)
    costs = _time(checkpoint, opened, serves, threads, quiet=json)
    opened.with_costs(costs)
    if json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        _print(model, bundle, found, costs, page)


def _measure(
    checkpoint: "Checkpoint",
    bundle: "Bundle",
    texts: "Texts",
    settings: "RankSettings",
    studies: "Collection[Study]",
    quiet: bool,
) -> "Profile":
    from rich.console import Console
    from rich.progress import Progress

    from morphserve.profile.result import make_profile

    with Progress(console=Console(stderr=True), disable=quiet) as progress:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done)

        return make_profile(checkpoint, bundle, texts, settings, studies, show)


def _keep(found: "Profile", bundle: "Bundle", report: Path | None) -> Path:
    """Writes the report, then stores the ranking in the bundle; returns the report's page."""
    from morphserve.profile.report import write_report

    page = write_report(found, report or bundle.path)
    bundle.with_ranking(found.ranking)
    return page


def _time(
    checkpoint: "Checkpoint",
    bundle: "Bundle",
    device: "Device",
    threads: int | None,
    quiet: bool,
) -> "DeviceCosts":
    import torch
    from rich.console import Console

    from morphserve.runtime.measure import measure_costs

    count = threads or torch.get_num_threads()
    with Console(stderr=True, quiet=quiet).status("timing layers") as status:
        return measure_costs(checkpoint, bundle, device.kind, count, status.update, device)


def _lis_settings(weights: str, distance: str) -> "LisSettings":
    from morphserve.configs.errors import ConfigError
    from morphserve.quantize.manifest import Distance, LisSettings

    if distance not in list(Distance):
        raise ConfigError(f"--distance {distance!r} must be one of {', '.join(Distance)}")
    try:
        lts, lrs, mds = (float(weight) for weight in weights.split(","))
        return LisSettings((lts, lrs, mds), Distance(distance))
    except ValueError:
        raise ConfigError(
            f"--lis-weights {weights!r} must be three numbers of at least 0, not all 0, as "
            "0.25,0.25,0.5"
        ) from None


def _print(model: str, bundle: Path, found: "Profile", costs: "DeviceCosts", page: Path) -> None:
    from rich.console import Console

    from morphserve.profile.verdict import chosen_order, headline, verdict

    console = Console(highlight=False, soft_wrap=True)
    ranking = found.ranking
    console.print(_orders_table("KL from full precision, 1e-3 nats/token", ranking, _divergences))
    console.print(_orders_table("perplexity", ranking, _perplexities))
    for table in _study_tables(found):
        console.print(table)
    _print_costs(console, costs)
    for sentence in (f"{headline(ranking)}.", *verdict(ranking)):
        console.print(sentence, markup=False)
    order = " ".join(map(str, chosen_order(ranking).layers))
    console.print(f"the bundle's order is now: {order}", markup=False)
    command = shlex.join(["morph", "serve", model, "--bundle", str(bundle)])
    console.print(f"wrote {page}, try: {command}", markup=False)


def _orders_table(
    title: str, ranking: "Ranking", cells: "Callable[[RankedOrder], list[str]]"
) -> "Table":
    table = _table(title, "INT4 layers", ranking.replaced)
    for order in ranking.orders:
        style = "bold" if order.name == ranking.chosen else None
        table.add_row(order.name, *cells(order), style=style)
    return table


def _study_tables(found: "Profile") -> "Iterator[Table]":
    if study := found.independence:
        title = "what one more INT4 layer adds to KL (1e-3 nats/token) and perplexity"
        table = _table(title, "INT4 layers before it", study.probed)
        for probe in study.probes:
            table.add_row(f"layer {probe.layer}: KL", *_thousandths(probe.divergence))
            extra = [f"{value:+.4f}" for value in probe.perplexity]
            table.add_row(f"layer {probe.layer}: perplexity", *extra)
        yield table
        table = _table("layers together and alone, KL in 1e-3", "INT4 layers", study.replaced)
        table.add_row("together", *_thousandths(study.joint))
        table.add_row("sum of each alone", *_thousandths(study.summed))
        yield table
    if found.positions:
        table = _table("INT4 early or late in a request: KL in 1e-3 and perplexity", "INT4", ())
        for heading in ("first half", "second half", "all tokens", "perplexity"):
            table.add_column(heading, justify="right")
        for schedule in found.positions.schedules:
            costs, middle = schedule.divergence, len(schedule.divergence) // 2
            halves = [sum(half) / len(half) for half in (costs[:middle], costs[middle:])]
            means = _thousandths([*halves, schedule.mean_divergence])
            table.add_row(schedule.name, *means, f"{schedule.perplexity:.3f}")
        yield table


def _print_costs(console: "Console", costs: "DeviceCosts") -> None:
    from morphserve.runtime.costs import cost_model

    threads = f"{costs.threads} thread{'s' if costs.threads > 1 else ''}"
    title = f"one layer in which each token sees itself alone, ms, on {costs.device}, {threads}"
    console.print(title, style="italic", markup=False)
    console.print(_costs_table(costs))
    model = cost_model(costs)
    errors = f"decode attention {model.decode.error:.0%}, prefill {model.prefill.error:.0%}"
    console.print(f"the cost model's mean error at measured points: {errors}", markup=False)


def _costs_table(costs: "DeviceCosts") -> "Table":
    from rich.table import Table

    table = Table()
    for heading in ("tokens", *(layer.variant for layer in costs.layers)):
        table.add_column(heading, justify="right")
    counts = costs.layers[0].curve.tokens
    times = zip(*(layer.curve.seconds for layer in costs.layers), strict=True)
    for tokens, row in zip(counts, times, strict=True):
        table.add_row(str(tokens), *(f"{1e3 * seconds:.3g}" for seconds in row))
    return table


def _table(title: str, first: str, numbers: "Iterable[int]") -> "Table":
    from rich.table import Table

    table = Table(title=title)
    table.add_column(first)
    for number in numbers:
        table.add_column(str(number), justify="right")
    return table


def _divergences(order: "RankedOrder") -> list[str]:
    return _thousandths(order.divergence)


def _perplexities(order: "RankedOrder") -> list[str]:
    return [f"{value:.3f}" for value in order.perplexity]


def _thousandths(values: "Iterable[float]") -> list[str]:
    return [f"{1e3 * value:.2f}" for value in values]
