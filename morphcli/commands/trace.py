"""`morph trace`: request traces described, cut, made and merged."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from morphserve.morphcli.settings import Command
from morphserve.morphcli.traces.formats import TimeUnit, parse_map, parse_where

if TYPE_CHECKING:
    from morphserve.morphcli.traces.readers import Reading
    from morphserve.morphcli.traces.rows import Rows

trace = typer.Typer(
    name="trace",
    help="Describe, cut, make and merge request traces.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_READING = "Reading"
_File = Annotated[Path, typer.Argument(help="CSV or JSON lines, also gzipped.")]
_Map = Annotated[
    str | None,
    typer.Option(
        metavar="time=COL,prompt=COL,output=COL",
        help="Columns of a file of no known format.",
        rich_help_panel=_READING,
    ),
]
_Unit = Annotated[
    TimeUnit | None,
    typer.Option(help="Of the stamps. [default: the format's]", rich_help_panel=_READING),
]
_Spread = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Spread stamps by chance over so much; 0 keeps rows of one stamp together. "
        "[default: 1 for whole-second BurstGPT, else 0]",
        rich_help_panel=_READING,
    ),
]
_Where = Annotated[
    list[str] | None,
    typer.Option(metavar="COL=VALUE", help="Only rows that have it.", rich_help_panel=_READING),
]
_Seed = Annotated[int, typer.Option(min=0, help="Of all that is drawn.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


@trace.command(cls=Command)
def describe(
    file: _File,
    map: _Map = None,
    time_unit: _Unit = None,
    spread: _Spread = None,
    where: _Where = None,
    seed: _Seed = 0,
    json: _Json = False,
) -> None:
    """Tell rates, burstiness and lengths of a trace."""
    import msgspec

    from morphserve.morphcli.traces.stats import describe as describe_rows

    reading = _reading(map, time_unit, spread, where, seed)
    found = describe_rows(_read(file, reading))
    if json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    from rich.console import Console

    from morphserve.morphcli.traces.next_command import after_describe
    from morphserve.morphcli.traces.show import description_table

    Console().print(description_table(found), highlight=False)
    typer.echo(after_describe(file, reading, found.seconds.total))


@trace.command(cls=Command)
def window(
    file: _File,
    seconds: Annotated[int, typer.Option(min=20, help="Length of the window.")] = 300,
    densest: Annotated[
        bool, typer.Option("--densest", help="Most requests, not calm, burst and calm.")
    ] = False,
    pick: Annotated[int, typer.Option(min=1, help="Which of the windows to write.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV file to write it to.")
    ] = None,
    force: _Force = False,
    map: _Map = None,
    time_unit: _Unit = None,
    spread: _Spread = None,
    where: _Where = None,
    seed: _Seed = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the windows as JSON.")] = False,
) -> None:
    """Find the windows worth a replay: calm, burst, calm."""
    import msgspec

    from morphserve.configs.errors import ConfigError
    from morphserve.morphcli.traces.windows import find_windows
    from morphserve.morphcli.traces.writer import refuse_to_replace, write_rows

    if output:
        refuse_to_replace(output, force)
    reading = _reading(map, time_unit, spread, where, seed)
    rows = _read(file, reading)
    found = find_windows(rows, seconds, densest=densest)
    if pick > len(found):
        raise ConfigError(f"--pick {pick}: there are {len(found)} windows")
    picked = found[pick - 1]
    if output:
        part = rows.cut(picked.first_row, picked.end_row)
        write_rows(output, part, [f"Requests of the window {picked} of {file.name}."])
    if json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    from rich.console import Console

    from morphserve.morphcli.traces.next_command import after_slice, after_window
    from morphserve.morphcli.traces.show import candidates_table

    Console().print(candidates_table(found), highlight=False)
    if output:
        typer.echo(f"wrote {output}: {picked.requests:,} requests, {after_slice(output)}")
    else:
        options = ["--seconds", str(seconds), *(["--densest"] if densest else [])]
        options += ["--pick", str(pick)] if pick > 1 else []
        typer.echo(after_window(file, reading, picked, options))


@trace.command(cls=Command)
def synth(
    kind: Annotated[str, typer.Argument(help="poisson, gamma, onoff or nbinom.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV file to write.")],
    rate: Annotated[float | None, typer.Option(help="Requests per second, mean.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length. [default: 300]")] = None,
    dispersion: Annotated[
        float | None,
        typer.Option(
            help="Variance over mean of requests per second. [default: 8 for onoff, nbinom]"
        ),
    ] = None,
    cv: Annotated[
        float | None, typer.Option(help="Of the gaps between requests, for gamma. [default: 3]")
    ] = None,
    burst: Annotated[float, typer.Option(help="Mean seconds of a burst, for onoff.")] = 15.0,
    like: Annotated[
        Path | None,
        typer.Option(help="Trace to take rate, length, dispersion and token counts from."),
    ] = None,
    prompt_tokens: Annotated[float, typer.Option(help="Mean, without --like.")] = 1000.0,
    output_tokens: Annotated[float, typer.Option(help="Mean, without --like.")] = 200.0,
    seed: _Seed = 0,
    force: _Force = False,
) -> None:
    """Make traffic with a wanted rate and burstiness."""
    from morphserve.morphcli.traces.stats import dispersion as dispersion_of
    from morphserve.morphcli.traces.synth import MadeLengths, make_rows, traffic
    from morphserve.morphcli.traces.writer import refuse_to_replace, write_rows

    refuse_to_replace(output, force)
    model = _read(like, _reading(seed=seed)) if like else None
    wanted = traffic(kind, rate, seconds, dispersion, cv, burst, model)
    rows = make_rows(wanted, model or MadeLengths(prompt_tokens, output_tokens), seed)
    source = f" like {like.name}" if like else ""
    write_rows(output, rows, [f"Made by morph trace synth {kind}{source}, seed {seed}."])
    found = dispersion_of(rows.time_us)
    told = f", dispersion {found:.2f} per second" if found is not None else ""
    if wanted.dispersion:
        told += f" (wanted {wanted.dispersion:.2f})"
    typer.echo(
        f"wrote {output}: {len(rows):,} requests, {len(rows) / wanted.seconds:.2f}/s "
        f"(wanted {wanted.rate:.2f}){told}, try: morph trace describe {shlex.quote(str(output))}"
    )


@trace.command(cls=Command)
def merge(
    files: Annotated[list[Path], typer.Argument(help="CSV or JSON lines, also gzipped.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV file to write.")],
    by_start: Annotated[
        bool, typer.Option("--by-start", help="Lay first rows on each other, dates or not.")
    ] = False,
    map: _Map = None,
    time_unit: _Unit = None,
    spread: _Spread = None,
    where: _Where = None,
    seed: _Seed = 0,
    force: _Force = False,
) -> None:
    """Merge traces by date, or by their starts; one file is rewritten."""
    from morphserve.morphcli.traces.merge import are_apart, merge_rows
    from morphserve.morphcli.traces.next_command import after_writing
    from morphserve.morphcli.traces.writer import refuse_to_replace, write_rows

    refuse_to_replace(output, force)
    parts = [
        _read(file, _reading(map, time_unit, spread, where, seed + i))
        for i, file in enumerate(files)
    ]
    rows = merge_rows(parts, by_start=by_start)
    if rows.start_us is not None and are_apart(parts):
        typer.echo("warning: these traces lie apart in time: --by-start joins them", err=True)
    write_rows(output, rows)
    how = "by their starts" if rows.start_us is None else "by date"
    typer.echo(
        f"wrote {output}: {len(rows):,} requests over {rows.span_s:,.1f} s, merged {how}, "
        f"{after_writing(output, rows.span_s)}"
    )


def _reading(
    map: str | None = None,
    time_unit: TimeUnit | None = None,
    spread: float | None = None,
    where: list[str] | None = None,
    seed: int = 0,
) -> "Reading":
    from morphserve.morphcli.traces.readers import Reading

    return Reading(
        parse_map(map) if map else None, time_unit, spread, parse_where(where or []), seed
    )


def _read(file: Path, reading: "Reading") -> "Rows":
    """The rows of a file; what is skipped is said on stderr."""
    from morphserve.morphcli.traces.arrivals import describe_bad_rows
    from morphserve.morphcli.traces.readers import read_rows

    rows = read_rows(file, reading)
    if skipped := describe_bad_rows(rows.source, rows.bad_rows, len(rows)):
        typer.echo(f"warning: {skipped}", err=True)
    return rows
