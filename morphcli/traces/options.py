"""Options of every command that replays a trace: how it is read, cut and scaled."""

from pathlib import Path
from typing import Annotated

import typer

from morphserve.morphcli.traces.formats import TimeUnit

TraceFile = Annotated[Path, typer.Option(help="CSV or JSON lines; docs/traces.md has the formats.")]
Columns = Annotated[
    str | None, typer.Option(help="Columns of the trace: time=COL,prompt=COL,output=COL.")
]
StampUnit = Annotated[TimeUnit | None, typer.Option(help="Of its stamps. [default: the format's]")]
Part = Annotated[
    str | None,
    typer.Option(
        help="Part of the trace: seconds t:92-154, or rows idx:0-100, to before the last."
    ),
]
RateScale = Annotated[float, typer.Option(help="Requests per second times this.")]
LengthScale = Annotated[float, typer.Option(help="Tokens per request times this.")]
MaxPrompt = Annotated[int | None, typer.Option(help="Cut longer prompts, tokens.")]
MaxOutput = Annotated[int | None, typer.Option(help="Cut longer outputs, tokens.")]
