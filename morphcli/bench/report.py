"""The report of a comparison: one HTML page that needs nothing but itself, and its drawings."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from morphserve.morphcli.bench.definitions import DEFINITIONS, OF_ANSWERS, definition_of
from morphserve.morphcli.bench.drawings import Drawing, Drawings, draw_all, runs_shown
from morphserve.morphcli.bench.quality_table import quality_rows
from morphserve.morphcli.bench.record import PLOTS, REPORT, Summary
from morphserve.morphcli.bench.setup import how_measured
from morphserve.morphcli.bench.summary import Run, show_s
from morphserve.morphcli.bench.table import Row, policy_title, show_share, table_rows
from morphserve.morphcli.bench.tiles import headline_tiles
from morphserve.morphcli.bench.verdict import verdict
from morphserve.morphcli.traces.schedule import Burst, Schedule
from morphserve.profile.drawing import COLOURS, DARK_COLOURS, as_file, inline_svg

_MAX_NAMES = 4  # of policies in the headline
_PAGE = Path(__file__).with_name("report.html")


def write_report(folder: Path, summary: Summary, runs: Sequence[Run], schedule: Schedule) -> Path:
    """Writes the page into `folder`, and each drawing as SVG and PNG into `plots` below it."""
    drawings = draw_all(summary, runs, schedule)
    plots, page = folder / PLOTS, folder / REPORT
    plots.mkdir(exist_ok=True)
    for old in (*plots.glob("*.svg"), *plots.glob("*.png")):
        old.unlink()  # of a run that this one replaces
    for drawing in drawings:
        (plots / f"{drawing.name}.svg").write_bytes(drawing.svg)
        (plots / f"{drawing.name}.png").write_bytes(as_file(drawing.figure, "png"))
    page.write_text(render_report(summary, runs, drawings), "utf-8")
    return page


def render_report(summary: Summary, runs: Sequence[Run], drawings: Drawings) -> str:
    """The page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "svg": _svg,
        "title": policy_title,
        "seconds": lambda value: "no answer" if value is None else show_s(value),
        "share": show_share,
        "definition": definition_of,
    }
    quality = quality_rows(summary)
    compared, tiles = headline_tiles(summary)
    return environment.from_string(_PAGE.read_text("utf-8")).render(
        summary=summary,
        colours=COLOURS,
        dark_colours=DARK_COLOURS,
        headline=_headline(summary),
        verdicts=_verdicts(summary),
        is_invalid=any(policy.faults for policy in summary.policies),
        compared=compared,
        tiles=tiles,
        rows=_headline_rows(summary, quality),
        quality_rows=quality,
        drawings=drawings,
        notes=list(_notes(summary, runs)),
        definitions=DEFINITIONS,
        setup=how_measured(summary),
    )


def _headline_rows(summary: Summary, quality: Sequence[Row]) -> list[Row]:
    """The table's rows without those that the table of quality tells anew."""
    told = [word for row in quality if (word := definition_of(row.label)) in OF_ANSWERS]
    rows = table_rows(summary)
    return [row for row in rows if not (row.is_detail and definition_of(row.label) in told)]


def _svg(drawing: Drawing) -> str:
    return inline_svg(drawing.svg, drawing.alt)


def _headline(summary: Summary) -> str:
    facts = summary.trace
    burst = ""
    if facts.burst is not None:
        burst = f", with a burst {_density(facts.burst)}"
    names = [policy_title(policy.policy) for policy in summary.policies]
    who = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    if len(names) > _MAX_NAMES:
        who = f"{len(names)} policies"
    return f"{facts.requests:,} requests in {facts.duration_s:,.0f} seconds{burst}: {who}"


def _verdicts(summary: Summary) -> list[list[str]]:
    """The verdict's sentences, those of each morph policy together."""
    found = verdict(summary)
    starts = tuple(f"{policy_title(p.policy)}: " for p in summary.policies)
    groups: list[list[str]] = []
    for sentence in found.sentences if found else ():
        if not groups or sentence.startswith(starts):
            groups.append([])
        groups[-1].append(sentence)
    return groups


def _density(burst: Burst) -> str:
    if not burst.usual_rate:
        return f"of up to {burst.peak_rate:.0f} requests per second"
    return f"{burst.peak_rate / burst.usual_rate:.0f} times as dense"


def _notes(summary: Summary, runs: Sequence[Run]) -> Iterator[str]:
    """What a reader of the timelines must know."""
    yield from summary.notes
    if len(summary.policies) > 1:
        yield "All scales are the same for every policy."
    shown = runs_shown(summary, runs)
    if len({run.rate for run in runs}) > 1:
        times = "" if shown[0].rate == 1 else f"{shown[0].rate:g} times "
        yield f"Of the loads, the one at {times}the schedule's own rate is drawn."
    if len(shown) > len({run.policy for run in shown}):
        yield (
            "Of each policy's repeats, the one in the middle is drawn: by missed targets, then by "
            "the 95th percentile of first tokens."
        )
    if any(policy.server for policy in summary.policies):
        yield "Layers stand in the order in which they are swapped, the first at the bottom."
    if not all(policy.server for policy in summary.policies):
        yield "A server that does not report its state has no panels of memory and precision."
