"""`morph quantize`: a checkpoint's layers at INT4, in a bundle."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from morphserve.quantize.build import QuantizeSettings
    from morphserve.quantize.calibration import Windows
    from morphserve.quantize.checkpoint import Checkpoint
    from morphserve.quantize.formats.source import QuantizedSource
    from morphserve.quantize.manifest import Manifest, Quantization

_WINDOWS, _WINDOW_TOKENS = 64, 256


class Method(StrEnum):
    GPTQ = "gptq"
    AWQ = "awq"
    RTN = "rtn"


class LayerReport(msgspec.Struct):
    layer: int
    full_bytes: int
    int4_bytes: int
    int8_bytes: int | None
    weight_error: float  # of INT4: norm of the error over norm of the weights
    output_error: float | None  # of INT4: the same of what the layer adds, on calibration text


class Report(msgspec.Struct):
    bundle: str
    method: str
    group_size: int
    symmetric: bool
    layers: list[LayerReport]


class Forecast(msgspec.Struct):
    file_bytes: dict[str, int]
    memory_bytes: int
    seconds: float


def quantize(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, or `demo`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle folder; MODEL.morph if not given.")
    ] = None,
    method: Annotated[Method, typer.Option(help="How INT4 weights are rounded.")] = Method.GPTQ,
    group_size: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale; 64 if hidden size is under 2048, else 128."),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--sym/--asym", help="One zero for all groups, or one for each.")
    ] = True,
    act_order: Annotated[
        bool, typer.Option("--act-order/--no-act-order", help="GPTQ: largest inputs first.")
    ] = True,
    int8: Annotated[bool, typer.Option("--int8", help="Make INT8 variants too.")] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file or folder; if not given, the held-out text of the model."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = _WINDOWS,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = _WINDOW_TOKENS,
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
    from morphserve.quantize.build import QuantizeSettings, default_group_size
    from morphserve.quantize.checkpoint import open_checkpoint
    from morphserve.quantize.formats.source import open_quantized

    checkpoint = open_checkpoint(model)
    imported = None if source is None else open_quantized(source, checkpoint)
    size = default_group_size(checkpoint.architecture) if group_size is None else group_size
    settings = QuantizeSettings(method, size, symmetric, act_order, int8, device)
    windows = None
    if calibration is not None or (imported is None and method is not Method.RTN):
        windows = _calibration(checkpoint, calibration, samples, length, seed)
    folder = output or Path(f"{Path(model).name}.morph")
    if dry_run:
        _forecast(checkpoint, settings, windows, imported, json)
        return
    manifest = _build(checkpoint, folder, settings, windows, imported, resume, force, quiet=json)
    report = _report(folder, checkpoint, manifest)
    if json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _print(model, report)


def _calibration(
    checkpoint: "Checkpoint", source: str | None, samples: int, length: int, seed: int
) -> "Windows":
    from morphserve.configs.errors import ConfigError
    from morphserve.quantize.calibration import Part, draw_windows

    length = min(length, checkpoint.architecture.max_position)
    try:
        return draw_windows(checkpoint, source, Part.CALIBRATION, samples, length, seed)
    except ConfigError as error:
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
        task = progress.add_task("quantising layers", total=layers, start=False)

        def show(layer: int) -> None:
            progress.start_task(task)
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
    )


def _forecast(
    checkpoint: "Checkpoint",
    settings: "QuantizeSettings",
    windows: "Windows | None",
    imported: "QuantizedSource | None",
    json: bool,
) -> None:
    from morphserve.quantize.build import plan_variants
    from morphserve.quantize.estimate import estimate

    found = estimate(checkpoint, plan_variants(settings, windows, imported))
    forecast = Forecast(
        {str(variant): size for variant, size in found.file_bytes.items()},
        found.memory_bytes,
        found.seconds,
    )
    if json:
        typer.echo(msgspec.json.encode(forecast).decode())
        return
    sizes = ", ".join(f"{size / 1e6:,.1f} MB {name}" for name, size in forecast.file_bytes.items())
    typer.echo(f"disk    {sizes}")
    typer.echo(f"memory  about {forecast.memory_bytes / 1e6:,.0f} MB at most")
    typer.echo(f"time    about {_duration(forecast.seconds)} on this machine as busy as it is now")
    typer.echo("nothing was written")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _report(folder: Path, checkpoint: "Checkpoint", manifest: "Manifest") -> Report:
    from morphserve.quantize.manifest import Variant

    int4 = manifest.variants[Variant.INT4]
    int8 = manifest.variants.get(Variant.INT8)
    return Report(
        bundle=str(folder),
        method=_described(int4.quantization),
        group_size=int4.quantization.group_size,
        symmetric=int4.quantization.symmetric,
        layers=[
            LayerReport(
                layer=i,
                full_bytes=checkpoint.layer_bytes(i),
                int4_bytes=file.num_bytes,
                int8_bytes=int8.layers[i].num_bytes if int8 else None,
                weight_error=file.weight_error,
                output_error=file.output_error,
            )
            for i, file in enumerate(int4.layers)
        ],
    )


def _described(how: "Quantization") -> str:
    return f"from {how.source}" if how.source else how.method


def _print(model: str, report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(report))
    command = shlex.join(["morph", "profile", model, "--bundle", report.bundle])
    console.print(f"wrote {report.bundle}, try: {command}", markup=False)


def _table(report: Report) -> "Table":
    from rich.table import Table

    groups = f"groups of {report.group_size}" if report.group_size else "one group per row"
    kind = "symmetric" if report.symmetric else "asymmetric"
    table = Table(title=f"INT4 {report.method}, {groups}, {kind}")
    with_int8 = report.layers[0].int8_bytes is not None
    headings = ["layer", "full MB", "INT4 MB", "INT4 / full", "weight error", "output error"]
    for heading in headings + ["INT8 MB"] * with_int8:
        table.add_column(heading, justify="right")
    for layer in report.layers:
        error = "" if layer.output_error is None else f"{layer.output_error:.4f}"
        sizes = _sizes(layer.full_bytes, layer.int4_bytes)
        int8 = [f"{layer.int8_bytes / 1e6:.2f}"] if layer.int8_bytes is not None else []
        table.add_row(str(layer.layer), *sizes, f"{layer.weight_error:.4f}", error, *int8)
    full = sum(layer.full_bytes for layer in report.layers)
    int4 = sum(layer.int4_bytes for layer in report.layers)
    table.add_section()
    table.add_row("all", *_sizes(full, int4))
    return table


def _sizes(full: int, int4: int) -> tuple[str, str, str]:
    return f"{full / 1e6:.2f}", f"{int4 / 1e6:.2f}", f"{int4 / full:.1%}"
