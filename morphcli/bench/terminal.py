"""What a comparison shows on a terminal: its progress and its headline table."""

from collections.abc import Callable, Sequence

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
from morphserve.morphcli.bench.table import UNKNOWN, Row, policy_title, show_share, table_rows
from morphserve.morphcli.bench.verdict import Verdict

_LABEL_WIDTH, _BETWEEN = 28, 3  # columns of characters


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
    rows = [row for row in table_rows(summary) if details or not row.is_detail]
    titles = [policy_title(policy.policy) for policy in summary.policies]
    widths = [
        max(len(title), *(len(row.cells[i]) for row in rows)) for i, title in enumerate(titles)
    ]
    fits = _LABEL_WIDTH + sum(widths) + _BETWEEN * (len(widths) + 1) <= console.width
    console.print(_policies_across(titles, rows) if fits else _policies_down(summary))


def print_summary(summary: Summary, found: Verdict | None, console: Console) -> None:
    """The whole table, what has to be known of it, and what it means."""
    print_table(summary, console, details=True)
    for note in summary.notes:
        console.print(note, highlight=False, markup=False)
    if found:
        console.print(*found.sentences, sep="\n", highlight=False, markup=False)


def _policies_across(titles: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("", min_width=_LABEL_WIDTH)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [escape(cell) for cell in row.cells]  # intervals stand in brackets
        if row.best is not None:
            cells[row.best] = f"[green]{cells[row.best]}[/]"
        table.add_row(escape(row.label), *cells)
    return table


def _policies_down(summary: Summary) -> Table:
    """A policy per row, the most telling figures across; the report has the others."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    known = [(h, c) for h, c in _COLUMNS.items() if any(map(c, summary.policies))]
    for heading, _ in known:
        table.add_column(heading, justify="right")
    for p in summary.policies:
        table.add_row(p.policy, *(cell(p) or UNKNOWN for _, cell in known))
    return table


# Empty: not known of this policy.
_COLUMNS: dict[str, Callable[[PolicySummary], str]] = {
    "missed": lambda p: show_share(p.slo_miss_share),
    "TTFT P95": lambda p: "never" if p.ttft_s.p95 is None else show_s(p.ttft_s.p95),
    "TPOT P95": lambda p: "never" if p.tpot_s.p95 is None else show_s(p.tpot_s.p95),
    "tokens/s": lambda p: f"{p.output_tokens_per_s:,.0f}",
    "below full": lambda p: show_share(p.server.quantized_token_share) if p.server else "",
    "perplexity": lambda p: "" if p.perplexity is None else f"{p.perplexity:.3f}",
}
