"""What `morph trace` prints: figures as a table, candidates with their shape."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from morphserve.morphcli.top.chart import sparkline
from morphserve.morphcli.traces.stats import Description, Lengths, Offered
from morphserve.morphcli.traces.windows import PARTS, Candidate

_NONE = "–"


def description_table(found: Description) -> Table:
    """The figures of a trace, a line each."""
    table = Table(box=None, show_header=False, pad_edge=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _lines(found):
        table.add_row(name, Text(text))
    return table


def _lines(found: Description) -> list[tuple[str, str]]:
    left_out = f", {found.left_out:,} left out by --where" if found.left_out else ""
    lines = [
        ("file", f"{found.file} ({found.format})"),
        ("requests", f"{found.requests:,}{left_out}"),
        ("span", f"{found.span_s:,.1f} s{f', from {found.start}' if found.start else ''}"),
        ("rate", f"{_number(found.rate, 2)} requests/s"),
    ]
    if found.gaps:
        gaps = found.gaps
        lines.append(
            (
                "gaps",
                f"CV {_number(gaps.cv, 2)}; p50 {gaps.p50_s:.3g} s, p99 {gaps.p99_s:.3g} s, "
                f"max {gaps.max_s:.3g} s",
            )
        )
    spread, again = found.dispersion, found.autocorrelation
    lines += [
        (
            "dispersion",
            f"{_number(spread.per_1s, 2)} per second, {_number(spread.per_10s, 1)} per 10 s, "
            f"{_number(spread.per_60s, 1)} per minute (1: chance arrivals)",
        ),
        (
            "autocorrelation",
            f"{_number(again.lag_1s, 2)} after 1 s, {_number(again.lag_5s, 2)} after 5 s, "
            f"{_number(again.lag_30s, 2)} after 30 s",
        ),
        (
            "seconds",
            f"{found.seconds.empty:,} of {found.seconds.total:,} empty, the densest has "
            f"{found.seconds.max_requests:,} requests",
        ),
    ]
    if minute := found.minute:
        lines.append(
            (
                "sliding minute",
                f"{minute.min:.2f} to {minute.max:.2f} requests/s, mean {minute.mean:.2f}; "
                f"the densest starts at {minute.max_starts_s:,} s",
            )
        )
    lines += [
        ("prompts", _lengths(found.prompt_tokens, found.offered_prompt)),
        ("outputs", _lengths(found.output_tokens, found.offered_output)),
        ("bad rows", _bad_rows(found)),
    ]
    return lines


def _lengths(found: Lengths, offered: Offered) -> str:
    return (
        f"mean {found.mean:,.0f}, p50 {found.p50:,}, p90 {found.p90:,}, p99 {found.p99:,}, "
        f"max {found.max:,} tokens; {_number(offered.mean, 0)} tokens/s, densest minute "
        f"{_number(offered.minute_max, 0)}"
    )


def _bad_rows(found: Description) -> str:
    if not found.bad_rows:
        return "none"
    reasons = "; ".join(f"{count:,}: {reason}" for reason, count in found.bad_reasons.items())
    return f"{found.bad_rows:,} ({reasons})"


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def candidates_table(candidates: Sequence[Candidate]) -> Table:
    """The windows that were found, the best first, each with its rate drawn over its length."""
    width_s = (candidates[0].end_s - candidates[0].start_s) / PARTS
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("", justify="right")
    table.add_column("window", no_wrap=True)
    for heading in ("rows", "req/s", "peak 1 s", "10 s", "prompt", "output"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"req/s per {width_s:g} s", no_wrap=True, min_width=PARTS)
    for i, found in enumerate(candidates, 1):
        table.add_row(
            f"{i}",
            f"{found}",
            f"{found.requests:,}",
            f"{found.rate:.2f}",
            f"{found.peak_1s:.0f}",  # the densest second
            f"{found.peak_10s:.1f}",
            f"{found.prompt_tokens:,.0f}",
            f"{found.output_tokens:,.0f}",
            sparkline(found.shape, PARTS),
        )
    return table
