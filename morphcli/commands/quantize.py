"""`morph quantize`: a checkpoint's layers as INT4, in a bundle."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from morphserve.quantize.checkpoint import Checkpoint
    from morphserve.quantize.manifest import Manifest


class LayerReport(msgspec.Struct):
    layer: int
    full_bytes: int
    int4_bytes: int
    relative_error: float


class Report(msgspec.Struct):
    bundle: str
    group_size: int
    layers: list[LayerReport]


def quantize(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, or `demo`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle folder; MODEL.morph if not given.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale; 64 if hidden size is under 2048, else 128."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make the bundle of INT4 layers that `morph serve` swaps from."""
    from morphserve.quantize.build import QuantizeSettings, build_bundle, default_group_size
    from morphserve.quantize.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    folder = output or Path(f"{Path(model).name}.morph")
    size = default_group_size(checkpoint.architecture) if group_size is None else group_size
    with _progress(json) as progress:
        layers = checkpoint.architecture.num_layers
        task = progress.add_task("rounding layers", total=layers, visible=False)
        manifest = build_bundle(
            checkpoint,
            folder,
            QuantizeSettings("rtn", size),
            force=force,
            on_layer=lambda i: progress.update(task, completed=i + 1, visible=True),
        )
    report = _report(folder, checkpoint, manifest)
    if json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _print(model, report)


def _progress(quiet: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), disable=quiet)


def _report(folder: Path, checkpoint: "Checkpoint", manifest: "Manifest") -> Report:
    from morphserve.quantize.manifest import Variant

    return Report(
        bundle=str(folder),
        group_size=manifest.variants[Variant.INT4].quantization.group_size,
        layers=[
            LayerReport(i, checkpoint.layer_bytes(i), file.num_bytes, file.weight_error)
            for i, file in enumerate(manifest.variants[Variant.INT4].layers)
        ],
    )


def _print(model: str, report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"INT4, groups of {report.group_size}, round to nearest")
    for heading in ("layer", "full MB", "INT4 MB", "INT4 / full", "relative weight error"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        table.add_row(str(layer.layer), *_cells(layer.full_bytes, layer.int4_bytes, layer))
    full = sum(layer.full_bytes for layer in report.layers)
    int4 = sum(layer.int4_bytes for layer in report.layers)
    table.add_section()
    table.add_row("all", *_cells(full, int4, None))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    command = shlex.join(["morph", "profile", model, "--bundle", report.bundle])
    console.print(f"wrote {report.bundle}, try: {command}", markup=False)


def _cells(full: int, int4: int, layer: LayerReport | None) -> tuple[str, str, str, str]:
    error = "" if layer is None else f"{layer.relative_error:.4f}"
    return f"{full / 1e6:.2f}", f"{int4 / 1e6:.2f}", f"{int4 / full:.1%}", error
