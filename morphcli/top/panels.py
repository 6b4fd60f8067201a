"""The parts of the live view: a state in, lines of text out. No text depends on its colour."""

import time
from collections.abc import Sequence

from rich.text import Text

from morphserve.morphcli.top.chart import CAPACITY, FULL, USED, kv_chart, sparkline
from morphserve.morphcli.top.history import Point
from morphserve.quantize.manifest import Variant
from morphserve.runtime.ladder import DEPTH
from morphserve.runtime.latency import FinishedRequest, Percentiles
from morphserve.runtime.messages import Event
from morphserve.runtime.server.state import State

DIM, BAD, GOOD, TITLE = "#8b949e", "bold #ff7b72", "#3fb950", "bold"
LAYERS = {  # glyph and style of each state of a layer
    "full": ("█", "#3fb950"),
    "int8": ("▓", "#a5a0ff"),
    "int4": ("░", "#e3b341"),
    "demoting": ("▼", "bold #ff7bd5"),
    "promoting": ("▲", "bold #39c5cf"),
}
_STATUS = {"ready": GOOD, "draining": "bold #e3b341"}


def header(state: State, note: str, width: int) -> Text:
    """Two lines: what serves, and how it stands."""
    first = Text.assemble(
        (state.model, TITLE),
        f"  policy {state.policy}",
        f"  up {_duration(state.uptime_s)}",
        f"  {state.url}",
        (f"  {state.device}, {state.dtype}", DIM),
    )
    rung, deepest = state.rung, len(state.capacities) - 1
    second = Text.assemble(
        ("● " + state.status, _STATUS.get(state.status, BAD)),
        f"  rung {rung}/{deepest}",
        f" → {state.target_rung}" if state.target_rung != rung else "",
        (" pinned", "bold") if state.pinned else "",
        f"  swaps {state.swaps}",
        f"  engine restarts {state.engine_restarts}" if state.engine_restarts else "",
        (f"  {note}", "bold") if note else "",
        _step(state),
    )
    return _lines([first, second], width)


def _step(state: State) -> tuple[str, str]:
    """The latest step's time beside what the cost model said of it."""
    if not state.predicted_step_s:
        return "", ""
    measured, predicted = (f"{s * 1e3:.3g}" for s in (state.step_s, state.predicted_step_s))
    return f"  step {measured} ms (predicted {predicted})", BAD if state.is_slow else ""


def layer_map(state: State, by_ladder: bool, width: int) -> Text:
    """A cell per layer, the least important first or in the order of the model."""
    order = _ladder_order(state) if by_ladder else list(range(len(state.layers)))
    title = "layers, least important first " if by_ladder else "layers, in the model's order "
    text = Text.assemble((title, TITLE), no_wrap=True, overflow="ellipsis")
    room = max(1, width - len(title))
    pitch = 2 if len(order) * 2 <= room else 1
    for i, layer in enumerate(order):
        if i * pitch and (i * pitch) % (room - room % pitch or 1) == 0:
            text.append("\n" + " " * len(title))
        text.append(LAYERS[layer_state(state, layer)][0].ljust(pitch), _style(state, layer))
    text.append("\n")
    counts = dict.fromkeys(LAYERS, 0)
    for layer in order:
        counts[layer_state(state, layer)] += 1
    for name, (glyph, style) in LAYERS.items():
        text.append(f"{glyph} ", style)
        text.append(f"{name} {counts[name]}  ")
    return text


def layer_state(state: State, layer: int) -> str:
    variant, to = state.layers[layer], state.swapping.get(layer)
    if to is None:
        return variant.value
    return "demoting" if DEPTH[to] > DEPTH[variant] else "promoting"


def _style(state: State, layer: int) -> str:
    return LAYERS[layer_state(state, layer)][1]


def _ladder_order(state: State) -> list[int]:
    """Each layer where it is first demoted; those that never are come last."""
    ladder = dict.fromkeys(rung.layer for rung in state.ladder)
    return [*ladder, *(i for i in range(len(state.layers)) if i not in ladder)]


def kv(state: State, points: Sequence[Point], width: int, height: int) -> Text:
    """A line of numbers and the chart below it."""
    grown = state.blocks_capacity / max(state.blocks_full, 1)
    title = Text.assemble(
        ("KV blocks ", TITLE),
        (f"█ {state.blocks_used} used", USED),
        (f"  ─ {state.blocks_capacity} now", CAPACITY),
        f" = {grown:.2f}× ",
        (f"┤ {state.blocks_full} full", FULL),
        f", {state.blocks_max} at most, {state.demand} wanted",
    )
    chart = kv_chart(points, state.blocks_max, state.blocks_full, width, max(1, height - 1))
    return Text("\n").join([_lines([title], width), chart])


def traffic(state: State, points: Sequence[Point], width: int) -> Text:
    """Queue, refusals, and tokens per second."""
    oldest = f" (oldest {state.oldest_wait_s:.1f} s)" if state.waiting else ""
    refused = sum(state.refused.values())
    by_reason = ", ".join(f"{name} {count}" for name, count in sorted(state.refused.items()))
    hits = "–" if state.prefix_hit_rate is None else f"{state.prefix_hit_rate:.0%}"
    rates = state.tokens_per_s
    room = max(4, width - 19)
    return _lines(
        [
            Text.assemble(
                (f"{state.running} running", TITLE),
                f"  {state.waiting} waiting{oldest}",
            ),
            Text.assemble(
                (f"{refused} refused", BAD if refused else ""),
                f"  {state.preemptions} preempted  prefix {hits}",
                f"  {by_reason}",
            ),
            Text.assemble(
                f"output tok/s {rates.generation:5.0f} ",
                (sparkline([point.generation for point in points], room), USED),
            ),
            Text.assemble(
                f"prompt tok/s {rates.prompt:5.0f} ",
                (sparkline([point.prompt for point in points], room), CAPACITY),
            ),
        ],
        width,
    )


def latency(state: State, width: int) -> Text:
    """Percentiles of the last minute; what misses the objective is marked with `!`."""
    rows = [
        ("TTFT", state.latency.ttft_s, state.slo.ttft_s),
        ("TPOT", state.latency.tpot_s, state.slo.tpot_s),
        ("E2E", state.latency.e2e_s, None),
    ]
    head = Text(f"{'last minute':<12}{'p50':>9}{'p95':>9}{'p99':>9}", DIM)
    return _lines([head, *(_latency_row(*row) for row in rows)], width)


def _latency_row(name: str, seen: Percentiles | None, objective_s: float | None) -> Text:
    wanted = "" if objective_s is None else f"≤{milliseconds(objective_s)}"
    row = Text(f"{name:<5}{wanted:<7}")
    values = (None, None, None) if seen is None else (seen.p50, seen.p95, seen.p99)
    for value in values:
        missed = value is not None and objective_s is not None and value > objective_s
        row.append(f"{milliseconds(value)}{'!' if missed else ''}".rjust(9), BAD if missed else "")
    return row


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f}s" if seconds >= 10 else f"{seconds * 1000:.0f}ms"


def memory(state: State, width: int) -> Text:
    """The budget as one bar, and what its parts are."""
    parts = [part for part in memory_parts(state) if part[1] > 0]
    total = max(1, sum(size for _, size, _, _ in parts))
    bar, names = Text(no_wrap=True), Text(no_wrap=True)
    done = 0
    for name, size, glyph, style in parts:
        cells = round((done + size) / total * width) - round(done / total * width)
        done += size
        bar.append(glyph * cells, style)
        names.append(f"{glyph}", style)
        names.append(f" {name} {_mebibytes(size)} ")
    title = Text.assemble(("memory ", TITLE), names)
    return _lines([title, bar], width)


def memory_parts(state: State) -> list[tuple[str, int, str, str]]:
    """Name, bytes, glyph and style; together the budget, nearly."""
    plan = state.memory
    weights = {
        variant: sum(
            plan.images[variant][i] for i, current in enumerate(state.layers) if current is variant
        )
        for variant in Variant
        if variant in plan.images
    }
    block = plan.page * len(state.layers)
    used, cached = state.blocks_used * block, state.blocks_cached * block
    free = state.blocks_capacity * block - used - cached
    return [
        ("static", plan.static, "╬", DIM),
        ("staging", plan.staging, "╱", "#ff7bd5"),
        *((v.value, size, *LAYERS[v.value]) for v, size in weights.items()),
        ("KV used", used, "■", USED),
        ("KV cached", cached, "▤", "#1f6feb"),
        ("KV free", max(0, free), "·", CAPACITY),
    ]


def _mebibytes(size: int) -> str:
    return f"{size / 2**30:.1f}G" if size >= 2**30 else f"{size / 2**20:.1f}M"


def events(shown: Sequence[Event], kinds: str, width: int, height: int) -> Text:
    """The latest below; a title says what is left out."""
    title = Text.assemble(("events", TITLE), (f"  {kinds} (e)", DIM))
    rows = [
        Text.assemble((f"{_clock(event.time)} ", DIM), (f"{event.kind:<9} ", "bold"), event.text)
        for event in list(shown)[-max(0, height - 1) :]
    ]
    return _lines([title, *rows], width)


def requests(shown: Sequence[FinishedRequest], width: int, height: int) -> Text:
    """The latest below."""
    head = f"{'prompt':>7}{'output':>7}{'low%':>6}{'queued':>8}{'TTFT':>8}{'TPOT':>8}{'E2E':>8}"
    title = Text.assemble(("requests ", TITLE), (f"{head}  end     id", DIM))
    rows = [_request(request) for request in list(shown)[-max(0, height - 1) :]]
    return _lines([title, *rows], width)


def _request(request: FinishedRequest) -> Text:
    output = sum(request.output_tokens.values())
    low = output - request.output_tokens.get(Variant.FULL, 0)
    times = (request.queued_s, request.ttft_s, request.tpot_s, request.e2e_s)
    reason = request.finish_reason
    return Text.assemble(
        (f"{_clock(request.time)} ", DIM),
        f"{request.prompt_tokens:>7}{output:>7}",
        f"{low / output if output else 0.0:>6.0%}",
        "".join(milliseconds(value).rjust(8) for value in times),
        (f"  {reason:<7} ", BAD if reason in ("abort", "error") else ""),
        (request.id, DIM),
    )


def _lines(lines: Sequence[Text], width: int) -> Text:
    """One below the other, none longer than `width`."""
    for line in lines:
        line.no_wrap = True
        line.truncate(max(1, width), overflow="ellipsis")
    return Text("\n", no_wrap=True).join(lines)


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s"
