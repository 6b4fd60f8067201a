"""`morph quantize`: a checkpoint's layers at INT4, in a bundle."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from morphserve.quantize.build import QuantizeSettings
    from morphserve.quantize.calibration import Windows
    from morphserve.quantize.checkpoint import Checkpoint
    from morphserve.quantize.formats.source import QuantizedSource
    from morphserve.quantize.manifest import Manifest

_WINDOWS, _WINDOW_TOKENS = 64, 256
_SAMPLES_OF_SPEED_S = 24 * 3600.0  # a large layer takes minutes


class Method(StrEnum):
    GPTQ = "gptq"
    AWQ = "awq"
    RTN = "rtn"


def quantize(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, or `demo`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle folder; MODEL.morph if not given.")
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(help="How INT4 weights are rounded.", show_default=Method.GPTQ.value),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale; 64 if hidden size is under 2048, else 128."),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--sym/--asym", help="One zero for all groups, or one for each.", show_default="sym"
        ),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="GPTQ: largest inputs first.",
            show_default="act-order",
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Make INT8 variants too.")] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file or folder; if not given, the held-out text of the model."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = _WINDOWS,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens per window.", show_default=f"{_WINDOW_TOKENS} or what fits"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            "--from-gptq",
            metavar="DIR",
            help="Take INT4 layers from a GPTQ, AWQ or compressed-tensors checkpoint.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped build.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate time, memory and disk.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make the bundle of INT4 layers that `morph serve` swaps from."""
    from morphserve.morphcli.quantize_report import show_report
    from morphserve.quantize.build import QuantizeSettings, default_group_size
    from morphserve.quantize.checkpoint import open_checkpoint
    from morphserve.quantize.formats.source import open_quantized

    if source is not None:
        _refuse_rounding(method, group_size, symmetric, act_order)
    checkpoint = open_checkpoint(model)
    imported = None if source is None else open_quantized(source, checkpoint)
    settings = QuantizeSettings(
        method=method or Method.GPTQ,
        group_size=default_group_size(checkpoint.architecture)
        if group_size is None
        else group_size,
        symmetric=symmetric is not False,
        act_order=act_order is not False,
        int8=int8,
        device=device,
    )
    windows = None
    if calibration is not None or (imported is None and method is not Method.RTN):
        windows = _calibration(checkpoint, calibration, samples, length, seed)
    folder = output or Path(f"{Path(model).expanduser().resolve().name}.morph")
    if dry_run:
        _forecast(checkpoint, folder, settings, windows, imported, resume, force, json)
        return
    manifest = _build(checkpoint, folder, settings, windows, imported, resume, force, quiet=json)
    show_report(model, folder, checkpoint, manifest, json)


def _refuse_rounding(
    method: Method | None, group_size: int | None, symmetric: bool | None, act_order: bool | None
) -> None:
    from morphserve.configs.errors import ConfigError

    given = {
        "--method": method,
        "--group-size": group_size,
        "--sym/--asym": symmetric,
        "--act-order/--no-act-order": act_order,
    }
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{name} cannot be chosen with --from, whose layers are rounded already: "
                "leave one of them out"
            )


def _calibration(
    checkpoint: "Checkpoint", source: str | None, samples: int, length: int | None, seed: int
) -> "Windows":
    from morphserve.configs.errors import ConfigError
    from morphserve.quantize.calibration import Part, draw_windows

    if length is None:
        length = min(_WINDOW_TOKENS, checkpoint.architecture.max_position)
    try:
        return draw_windows(checkpoint, source, Part.CALIBRATION, samples, length, seed)
    except ConfigError as error:
        if source is not None:
            raise
        raise ConfigError(f"{error}; --method rtn needs no text") from error


def _build(
    checkpoint: "Checkpoint",
    folder: Path,
    settings: "QuantizeSettings",
    windows: "Windows | None",
    imported: "QuantizedSource | None",
    resume: bool,
    force: bool,
    quiet: bool,
) -> "Manifest":
    from morphserve.quantize.build import build_bundle

    with _progress(quiet) as progress:
        layers = checkpoint.architecture.num_layers
        task = progress.add_task("quantising layers", total=layers)

        def show(layer: int) -> None:
            progress.update(task, completed=layer + 1)

        return build_bundle(*(checkpoint, folder, settings, windows, force, resume, show, imported))


def _progress(quiet: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
        speed_estimate_period=_SAMPLES_OF_SPEED_S,
    )


def _forecast(
    checkpoint: "Checkpoint",
    folder: Path,
    settings: "QuantizeSettings",
    windows: "Windows | None",
    imported: "QuantizedSource | None",
    resume: bool,
    force: bool,
    json: bool,
) -> None:
    from morphserve.morphcli.quantize_report import show_forecast
    from morphserve.quantize.build import check, plan_variants
    from morphserve.quantize.estimate import estimate
    from morphserve.quantize.workspace import check_target

    check(checkpoint.architecture, settings, windows, imported)
    check_target(folder, force, resume)
    found = estimate(checkpoint, plan_variants(settings, windows, imported))
    show_forecast(folder, found, imported is not None, json)
