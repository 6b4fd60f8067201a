"""The report of a comparison as one HTML page that needs nothing but itself."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template

from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.summary import Run, show_s
from morphserve.morphcli.bench.table import Row, policy_title, table_rows
from morphserve.morphcli.bench.timeline import draw_timeline, make_frame
from morphserve.morphcli.bench.verdict import verdict
from morphserve.morphcli.traces.schedule import Burst, Schedule, rate_per_second

_DEFINITIONS = {
    "full precision": "The model as it was trained. With few requests it is all anyone needs.",
    "INT4 layer": "A layer whose weights take 4 bits each: a quarter of the memory of 16-bit ones, "
    "at some loss of quality. The memory it frees becomes KV cache.",
    "morph": "Full precision until memory runs short; then the least important layers become INT4, "
    "one after another, and go back when the pressure is gone.",
    "KV cache": "Memory of what each running request has read and written so far. When it is full, "
    "new requests wait and running ones may be preempted.",
    "time to first token": "From the moment a request was due to its first streamed token (TTFT). "
    "Percentiles are nearest-rank over all requests sent; one that was never answered counts as "
    "infinitely slow.",
    "time per further token": "(last token − first token) / (tokens − 1) of one request (TPOT), "
    "over the requests that were answered to the end.",
    "missed the target": "Requests that were slower than the target, refused, failed, or not "
    "finished in time, out of all requests sent.",
    "preemption": "A running request was stopped to free its memory; its work is done again later.",
    "tokens made below full precision": "Share of all tokens generated while at least one layer "
    "was INT8 or INT4, counted by the server.",
    "perplexity": "How surprised the model is by text it has never seen; lower is better. Measured "
    "for each mix of layers that was served, then averaged (geometrically) over the tokens that it "
    "generated, as seen in ten samples a second.",
    "all layers at full precision again after the burst": "Counted from the end of the burst "
    "(the last second in which the 5 s mean of arrivals was over twice its median, by more than "
    "chance) to the first sample of the server in which every layer that was swapped by then had "
    "come back. Layers that were swapped later are counted on their own.",
    "same text": "Share of requests, answered under both policies, with the same greedy text.",
}


def render_report(summary: Summary, runs: Sequence[Run], schedule: Schedule) -> str:
    """The page."""
    page = resources.files("morphserve.morphcli.bench").joinpath("report.html").read_text("utf-8")
    found = verdict(summary)
    sentences = list(found.sentences) if found else []
    names = [policy_title(policy.policy) for policy in summary.policies]
    return Template(page).substitute(
        eyebrow=escape(f"MorphServe bench · {summary.settings.model} · {summary.created}"),
        headline=escape(_headline(summary, names)),
        verdict="".join(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        table=_table(names, table_rows(summary)),
        timeline_note=escape(_timeline_note(summary, names)),
        figures="".join(_figures(summary, runs, schedule)),
        definitions=_list(_DEFINITIONS.items()),
        setup=_list(_setup(summary)),
    )


def _headline(summary: Summary, names: Sequence[str]) -> str:
    facts = summary.trace
    burst = ""
    if facts.burst is not None:
        burst = f", with a burst {_density(facts.burst)}"
    who = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"{facts.requests} requests in {facts.duration_s:.0f} seconds{burst}: {who}"


def _density(burst: Burst) -> str:
    if not burst.usual_rate:
        return f"of up to {burst.peak_rate:.0f} requests per second"
    return f"{burst.peak_rate / burst.usual_rate:.0f} times as dense"


def _timeline_note(summary: Summary, names: Sequence[str]) -> str:
    same = "All scales are the same for every policy. " if len(names) > 1 else ""
    states = any(policy.server for policy in summary.policies)
    missing = "" if states else "This server does not report its state, so memory is not shown. "
    return f"{same}{missing}Point at a mark for its numbers."


def _table(names: Sequence[str], rows: Iterable[Row]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(_table_row(row) for row in rows)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _table_row(row: Row) -> str:
    cells = "".join(
        f"<td{' class=best' if i == row.best else ''}>{escape(cell)}</td>"
        for i, cell in enumerate(row.cells)
    )
    css = ' class="detail"' if row.is_detail else ""
    return f'<tr{css}><th scope="row">{escape(row.label)}</th>{cells}</tr>'


def _figures(summary: Summary, runs: Sequence[Run], schedule: Schedule) -> Iterable[str]:
    rates = rate_per_second(schedule.arrivals, schedule.duration_s)
    frame = make_frame(runs, rates, summary.settings.slo, summary.trace.burst)
    for run in runs:
        title = escape(policy_title(run.policy))
        drawing = draw_timeline(run, frame)
        yield f"<figure><figcaption>{title}</figcaption>{drawing}</figure>"


def _list(items: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in items)


def _setup(summary: Summary) -> list[tuple[str, str]]:
    settings, facts, machine = summary.settings, summary.trace, summary.environment
    shape, trace = settings.shape, settings.trace
    if shape.window_s is not None:
        trace += ", seconds {:g} to {:g}".format(*shape.window_s)
    trace += f"; rate × {shape.rate_scale:g}, time × {shape.time_scale:g}"
    trace += f", prompts × {shape.length_scale:g}"
    trace += f", outputs × {shape.length_scale * shape.output_scale:g}"
    trace += f", seed {shape.seed}. {facts.prompt_tokens:,} prompt and "
    trace += f"{facts.output_tokens:,} output tokens; {facts.clipped_prompts} prompts and "
    trace += f"{facts.clipped_outputs} outputs cut to the longest allowed. {facts.skipped_rows}"
    mixes = ", ".join(f"{mix}: {mix.perplexity:.3f}" for mix in summary.perplexities)
    lags = (f"{policy_title(p.policy)} {show_s(p.lag_p99_s)}" for p in summary.policies)
    return [
        ("trace", trace),
        ("prompts", f"cut from {settings.prompts or 'the held-out text of the model'}"),
        ("servers", _servers(summary)),
        ("load", "Open loop: each request leaves at its own time from a separate process, answered "
         f"or not. How late they left (P99): {', '.join(lags)}; over 50 ms a run proves nothing."),
        ("perplexity by quantised layers", mixes or "not measured"),
        ("machine", f"{machine.cpu}, {machine.cores} cores, {machine.platform}"),
        ("software", f"morphserve {machine.morphserve} ({machine.commit or 'no commit'}), "
         f"Python {machine.python}, torch {machine.torch}"),
    ]  # fmt: skip


def _servers(summary: Summary) -> str:
    settings = summary.settings
    if settings.url is not None:
        return f"already running at {settings.url}"
    return (
        f"a fresh one per policy, in the order {', '.join(settings.policies)}, each with "
        f"{settings.memory_budget or 'the default amount'} of memory for weights and KV cache; "
        f"bundle {settings.bundle or 'none'}; answers given up after {settings.timeout_s:g} s"
    )
