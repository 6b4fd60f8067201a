"""`morph export`: a bundle's INT4 layers as a checkpoint for other programs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer


class Format(StrEnum):
    GPTQ = "gptq"


class Report(msgspec.Struct):
    output: str
    format: str
    num_layers: int
    num_bytes: int


def export(
    bundle: Annotated[Path, typer.Argument(help="Made by `morph quantize`.")],
    model: Annotated[str, typer.Argument(help="Its Hugging Face folder, or `demo`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    format: Annotated[Format, typer.Option(help="Of the checkpoint.")] = Format.GPTQ,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the INT4 layers as a checkpoint for other programs.

    In GPTQ's format, which vLLM reads; that GPTQModel loads it was checked.
    """
    from rich.console import Console
    from rich.progress import Progress

    from morphserve.quantize.bundle import open_bundle
    from morphserve.quantize.checkpoint import open_checkpoint
    from morphserve.quantize.formats.export import export_gptq

    checkpoint = open_checkpoint(model)
    opened = open_bundle(str(bundle), checkpoint)
    with Progress(console=Console(stderr=True), disable=json) as progress:
        task = progress.add_task("writing layers", total=opened.num_layers)
        num_bytes = export_gptq(
            opened, checkpoint, output, lambda i: progress.update(task, completed=i + 1)
        )
    report = Report(str(output), format, opened.num_layers, num_bytes)
    if json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        typer.echo(
            f"wrote {output}: {report.num_layers} INT4 layers as {format}, "
            f"{num_bytes / 1e6:.1f} MB, for programs that read GPTQ checkpoints"
        )
