"""What `morph quantize` prints: of a bundle that was made, and of one that would be."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer

if TYPE_CHECKING:
    from rich.table import Table

    from morphserve.quantize.checkpoint import Checkpoint
    from morphserve.quantize.estimate import Estimate
    from morphserve.quantize.manifest import Manifest, Quantization


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
    bundle: str
    file_bytes: dict[str, int]
    memory_bytes: int
    seconds: float  # of the CPU, for all layers


def show_forecast(folder: Path, found: "Estimate", imported: bool, json: bool) -> None:
    forecast = Forecast(
        str(folder),
        {str(variant): size for variant, size in found.file_bytes.items()},
        found.memory_bytes,
        found.seconds,
    )
    if json:
        typer.echo(msgspec.json.encode(forecast).decode())
        return
    sizes = ", ".join(f"{size / 1e6:,.1f} MB {name}" for name, size in forecast.file_bytes.items())
    duration = _duration(forecast.seconds)
    typer.echo(f"bundle  {folder}")
    typer.echo(f"disk    {'about ' if imported else ''}{sizes}")
    typer.echo(f"memory  about {forecast.memory_bytes / 1e6:,.0f} MB")
    typer.echo(f"time    about {duration} for all layers, on this CPU as busy as it is now")
    typer.echo("nothing was written")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def show_report(
    model: str, folder: Path, checkpoint: "Checkpoint", manifest: "Manifest", json: bool
) -> None:
    report = _report(folder, checkpoint, manifest)
    if json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _print(model, report)


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
