"""`morph verify`: whether a bundle is whole and agrees with its model."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from morphserve.quantize.verify import LayerCheck


def verify(
    bundle: Annotated[Path, typer.Argument(help="Made by `morph quantize`.")],
    model: Annotated[
        str | None, typer.Argument(help="Its full-precision model, to compare every layer with.")
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Least cosine with the full-precision layer; if not given, low enough for any "
            "rounding to INT4.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check a bundle; with MODEL, compare every layer.

    Without MODEL: the manifest, and checksum, tensors and values of every file. With MODEL: also
    that the bundle was made from it, and of every layer the cosine of its output with full
    precision and whether it writes keys and values as full precision does. Ends with code 3 if
    anything is wrong.
    """
    import msgspec
    from rich.console import Console
    from rich.progress import track

    from morphserve.quantize.agreement import FLOOR
    from morphserve.quantize.bundle import BadBundle, check_base, read_bundle
    from morphserve.quantize.checkpoint import open_checkpoint
    from morphserve.quantize.verify import verify_layers

    opened = read_bundle(str(bundle))
    checkpoint = None if model is None else open_checkpoint(model)
    if checkpoint is not None:
        check_base(opened, checkpoint)
    least = FLOOR if floor is None else floor
    total = opened.num_layers * len(opened.manifest.variants)
    checks = list(
        track(
            verify_layers(opened, checkpoint, least),
            "checking layers",
            total=total,
            console=Console(stderr=True),
            disable=json,
            transient=True,
        )
    )
    if json:
        typer.echo(msgspec.json.encode(checks).decode())
    else:
        _print(bundle, model, checks)
    failed = [check for check in checks if check.fault]
    if failed:
        raise BadBundle(
            f"{len(failed)} of {total} layers of {bundle} failed: {_way_out(bundle, model, failed)}"
        )


def _way_out(bundle: Path, model: str | None, failed: "list[LayerCheck]") -> str:
    command = shlex.join(["morph", "quantize", model or "MODEL", "--output", str(bundle)])
    again = f"make it again with `{command} --force` and the options it was made with"
    if all(check.agreement and check.agreement.shares_cache for check in failed):
        return f"if they are rounded this coarsely on purpose, give a lower --floor; else {again}"
    return again


def _print(bundle: Path, model: str | None, checks: "list[LayerCheck]") -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if model is not None:
        _print_table(checks)
    faults = [check.fault for check in checks if check.fault]
    for fault in faults:
        console.print(fault, markup=False)
    if faults:
        return
    if model is None:
        command = shlex.join(["morph", "verify", str(bundle)])
        console.print(
            f"{bundle} is whole: {len(checks)} layers, checksums and tensors right; to compare "
            f"them with full precision: {command} MODEL",
            markup=False,
        )
    else:
        command = shlex.join(["morph", "serve", model, "--bundle", str(bundle)])
        console.print(
            f"{bundle} is whole and agrees with {model}, try: {command}",
            markup=False,
        )


def _print_table(checks: "list[LayerCheck]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="against full precision")
    table.add_column("layer", justify="right")
    table.add_column("variant")
    for heading in ("cosine", "attention", "MLP", "K, V scaled by"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for check in checks:
        table.add_row(
            str(check.layer),
            check.variant,
            *_figures(check),
            "[red]FAILED[/]" if check.fault else "ok",
        )
    Console(highlight=False, soft_wrap=True).print(table)


def _figures(check: "LayerCheck") -> tuple[str, ...]:
    found = check.agreement
    if found is None:
        return ("",) * 4
    cosines = (found.cosine, found.attention, found.mlp)
    return (*(f"{cosine:.4f}" for cosine in cosines), f"{found.kv_shift:.1%}")
