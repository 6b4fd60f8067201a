"""`morph inspect`: what is in a bundle."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from morphserve.quantize.bundle import Bundle
    from morphserve.quantize.costs import DeviceCosts
    from morphserve.quantize.manifest import Manifest, Quantization, Ranking, TextSample


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Made by `morph quantize`.")],
    json: Annotated[bool, typer.Option("--json", help="Print its manifest as JSON.")] = False,
) -> None:
    """Show what is in a bundle.

    Its model, variants, layers with their errors, order, ranking, and measured times.
    """
    import msgspec

    from morphserve.quantize.bundle import read_bundle

    opened = read_bundle(str(bundle))
    if json:
        typer.echo(msgspec.json.encode(opened.manifest).decode())
    else:
        _print(bundle, opened)


def _print(path: Path, bundle: "Bundle") -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in _facts(path, bundle.manifest):
        console.print(line, markup=False)
    console.print(_variants(bundle.manifest))
    console.print(_layers(bundle))
    for line in _order(path, bundle):
        console.print(line, markup=False)
    if ranking := bundle.manifest.ranking:
        console.print(_orders(ranking))
    for costs in bundle.manifest.costs:
        how = f"{costs.kernels}, {costs.threads} threads, {costs.dtype}"
        title = f"ms per layer on {costs.device} ({how})"
        console.print(title, style="italic", markup=False)
        console.print(_costs(costs))
    command = shlex.join(["morph", "verify", str(path)])
    console.print(f"to check its files: {command}", markup=False)


def _facts(path: Path, manifest: "Manifest") -> list[str]:
    arch, base = manifest.architecture, manifest.base
    return [
        f"{path}: made by {manifest.tool}, schema {manifest.schema}",
        f"for {base.name}, fingerprint {base.fingerprint[:16]}…",
        f"{arch.family}, {arch.num_layers} layers, hidden {arch.hidden_size}, "
        f"intermediate {arch.intermediate_size}, {arch.num_heads} heads of {arch.head_dim} over "
        f"{arch.num_kv_heads} of keys and values, {arch.dtype}",
    ]


def _variants(manifest: "Manifest") -> "Table":
    from rich.table import Table

    table = Table(title="variants")
    for heading in ("variant", "method", "bits", "inputs per scale", "MB", "calibrated on"):
        table.add_column(heading)
    for variant, files in manifest.variants.items():
        how = files.quantization
        num_bytes = sum(file.num_bytes for file in files.layers)
        table.add_row(
            variant,
            _method(how),
            str(how.bits),
            str(how.group_size or "all of a row"),
            f"{num_bytes / 1e6:.2f}",
            _text(how.calibration) if how.calibration else "nothing",
        )
    return table


def _method(how: "Quantization") -> str:
    details = [how.method, "symmetric" if how.symmetric else "asymmetric"]
    if how.act_order:
        details.append("activation order")
    if how.source:
        details.append(f"from {how.source}")
    return ", ".join(details)


def _text(sample: "TextSample") -> str:
    return f"{sample.source}: {sample.num_windows} x {sample.window_tokens} tokens"


def _layers(bundle: "Bundle") -> "Table":
    from rich.table import Table

    table = Table(title="layers (errors relative to full precision)")
    table.add_column("layer", justify="right")
    for variant in bundle.manifest.variants:
        for heading in ("MB", "weight error", "output error"):
            table.add_column(f"{variant} {heading}", justify="right")
    for i in range(bundle.num_layers):
        cells = []
        for files in bundle.manifest.variants.values():
            file = files.layers[i]
            output = "" if file.output_error is None else f"{file.output_error:.4f}"
            cells += [f"{file.num_bytes / 1e6:.2f}", f"{file.weight_error:.4f}", output]
        table.add_row(str(i), *cells)
    return table


def _order(path: Path, bundle: "Bundle") -> list[str]:
    layers = " ".join(map(str, bundle.order))
    ranking = bundle.manifest.ranking
    if ranking is None:
        command = f"morph profile MODEL --bundle {shlex.quote(str(path))}"
        return [f"order: {layers} (front to back; to rank layers: {command})"]
    chosen = next(order for order in ranking.orders if order.name == ranking.chosen)
    lines = [
        f"order: {layers} ({ranking.chosen})",
        f"scored on {_text(ranking.calibration)}; chosen on {_text(ranking.selection)}",
    ]
    if chosen.scores:
        lines.insert(1, "scores: " + " ".join(f"{score:.4g}" for score in chosen.scores))
    return lines


def _orders(ranking: "Ranking") -> "Table":
    from rich.table import Table

    table = Table(title="KL from full precision, 1e-3 nats/token, and perplexity")
    table.add_column("INT4 layers", no_wrap=True)
    for number in ranking.replaced:
        table.add_column(str(number), justify="right")
    for order in ranking.orders:
        style = "bold" if order.name == ranking.chosen else None
        pairs = zip(order.divergence, order.perplexity, strict=True)
        cells = [f"{1e3 * kl:.2f}  {perplexity:.3f}" for kl, perplexity in pairs]
        table.add_row(order.name, *cells, style=style)
    return table


def _costs(costs: "DeviceCosts") -> "Table":
    from rich.table import Table

    table = Table()
    curves = {layer.variant: layer.curve for layer in costs.layers} | {"all but layers": costs.rest}
    for heading in ("tokens", *curves):
        table.add_column(heading, justify="right")
    times = [dict(zip(curve.tokens, curve.seconds, strict=True)) for curve in curves.values()]
    for tokens in sorted({tokens for curve in curves.values() for tokens in curve.tokens}):
        cells = (f"{1e3 * curve[tokens]:.3f}" if tokens in curve else "" for curve in times)
        table.add_row(str(tokens), *cells)
    return table
