"""`morph doctor`: whether this machine can serve, and how well."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from morphserve.morphcli.doctor import Finding


def doctor(
    port: Annotated[int, typer.Option(min=1, max=65535, help="That a server would take.")] = 8000,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Tell what this machine lacks, and what to do."""
    import msgspec

    from morphserve.morphcli.doctor import Mark, examine

    findings = []
    for finding in examine(port):
        findings.append(finding)
        if not json:
            _print(finding)
    if json:
        typer.echo(msgspec.json.encode(findings).decode())
    if any(finding.mark is Mark.MISSING for finding in findings):
        raise typer.Exit(1)
    if not json:
        typer.echo("this machine can serve, try: morph serve demo --policy off")


def _print(finding: "Finding") -> None:
    from morphserve.morphcli.doctor import Mark

    glyph, colour = {
        Mark.GOOD: ("✓", "green"),
        Mark.NOTE: ("!", "yellow"),
        Mark.MISSING: ("✗", "red"),
    }[finding.mark]
    typer.echo(f"{typer.style(glyph, fg=colour)} {finding.name:<16} {finding.found}")
    if finding.remedy:
        typer.echo(f"  {'':<16} → {finding.remedy}")
