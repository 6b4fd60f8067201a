"""What a comparison shows on a terminal: its progress and its headline table."""

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.summary import show_s
from morphserve.morphcli.bench.table import UNKNOWN, policy_title, show_share, table_rows

_LABEL_WIDTH, _CELL_WIDTH = 30, 16  # narrower columns would cut figures off


def request_progress(console: Console) -> Progress:
    """A bar of requests per run."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeElapsedColumn(),
        console=console,
    )


def print_table(summary: Summary, console: Console, *, details: bool) -> None:
    """The headline table; the best cell of a row is green."""
    if console.width < _LABEL_WIDTH + _CELL_WIDTH * len(summary.policies):
        return console.print(_policies_down(summary))
    table = Table(box=SIMPLE_HEAD)
    table.add_column("", min_width=28)
    for policy in summary.policies:
        table.add_column(policy_title(policy.policy), justify="right")
    for row in table_rows(summary):
        if details or not row.is_detail:
            cells = [escape(cell) for cell in row.cells]  # intervals stand in brackets
            if row.best is not None:
                cells[row.best] = f"[green]{cells[row.best]}[/]"
            table.add_row(escape(row.label), *cells)
    console.print(table)


def _policies_down(summary: Summary) -> Table:
    """A policy per row, the most telling figures across; the report has the others."""
    table = Table("", box=SIMPLE_HEAD)
    known = [(h, c) for h, c in _COLUMNS.items() if any(map(c, summary.policies))]
    for heading, _ in known:
        table.add_column(heading, justify="right")
    for p in summary.policies:
        table.add_row(policy_title(p.policy), *(cell(p) or UNKNOWN for _, cell in known))
    return table


# Empty: not known of this policy.
_COLUMNS: dict[str, Callable[[PolicySummary], str]] = {
    "missed": lambda p: show_share(p.slo_miss_share),
    "first token P95": lambda p: "never" if p.ttft_s.p95 is None else show_s(p.ttft_s.p95),
    "per token P95": lambda p: "never" if p.tpot_s.p95 is None else show_s(p.tpot_s.p95),
    "tokens/s": lambda p: f"{p.output_tokens_per_s:,.0f}",
    "below full": lambda p: show_share(p.server.quantized_token_share) if p.server else "",
    "perplexity": lambda p: "" if p.perplexity is None else f"{p.perplexity:.3f}",
}
