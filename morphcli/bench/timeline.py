"""The drawing of one policy: panels over a shared time axis."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from morphserve.configs.schema import Slo
from morphserve.morphcli.bench import plot
from morphserve.morphcli.bench.plot import Scale
from morphserve.morphcli.bench.server import State
from morphserve.morphcli.bench.summary import Run, meets, show_s
from morphserve.morphcli.traces.schedule import Burst

WIDTH = 420
_LEFT, _RIGHT, _TOP, _TITLE, _GAP = 46, 12, 18, 24, 12
_FASTEST_S = 0.01  # foot of the axis of first tokens


@dataclass(frozen=True, slots=True)
class Frame:
    """Axis limits shared by all policies of a report, so that the eye may compare them."""

    end_s: float
    rates: list[int]  # requests offered in each second
    slowest_s: float  # top of the axis of first tokens
    kv_tokens: float
    requests: float
    preemptions: float  # in one second
    slo: Slo
    burst: Burst | None


def make_frame(runs: Sequence[Run], rates: list[int], slo: Slo, burst: Burst | None) -> Frame:
    """Limits that hold every run."""
    outcomes = [o for run in runs for o in run.outcomes]
    states = [s for run in runs for s in run.states]
    ends = [o.intended_s + (o.e2e_s or 0.0) for o in outcomes]
    ends += [run.at_s(run.states[-1]) for run in runs if run.states]
    slowest = max([o.ttft_s or 0.0 for o in outcomes] + [2 * (slo.ttft_s or 0.1), 10 * _FASTEST_S])
    kv = max((max(s.blocks_capacity, s.blocks_full) * s.block_tokens for s in states), default=1)
    return Frame(
        end_s=max([*ends, float(len(rates))]),
        rates=rates,
        slowest_s=10 ** (math.ceil(10 * math.log10(slowest)) / 10),
        kv_tokens=plot.nice_ceiling(kv),
        requests=plot.nice_ceiling(max((max(s.running, s.waiting) for s in states), default=1)),
        preemptions=plot.nice_ceiling(max(max([0, *_preempted(r).values()]) for r in runs)),
        slo=slo,
        burst=burst,
    )


def _preempted(run: Run) -> Counter[int]:
    counts: Counter[int] = Counter()
    for before, after in zip(run.states, run.states[1:], strict=False):
        counts[max(0, int(run.at_s(after)))] += after.preemptions - before.preemptions
    return counts


@dataclass(slots=True)
class _Canvas:
    frame: Frame
    x: Scale
    y: float = _TOP
    parts: list[str] = field(default_factory=list)

    def panel(self, title: str, legend: Iterable[tuple[str, str]], height: float) -> float:
        """Write the heading of the next panel and return its top."""
        self.parts.append(plot.text(0, self.y + 11, title, "title"))
        spots = "".join(f'<tspan class="{css}" dx="10">{name}</tspan>' for name, css in legend)
        if spots:
            at = WIDTH - _RIGHT
            self.parts.append(
                f'<text x="{at}" y="{self.y + 11:g}" text-anchor="end">{spots}</text>'
            )
        top = self.y + _TITLE
        self.y = top + height + _GAP
        return top

    def axis(self, scale: Scale, ticks: Iterable[float], show: Callable[[float], str]) -> None:
        for tick in ticks:
            y = scale(tick)
            self.parts.append(plot.line(_LEFT, y, WIDTH - _RIGHT, y, "grid"))
            self.parts.append(plot.text(_LEFT - 6, y + 3.5, show(tick), "tick", "end"))

    def linear(self, top: float, height: float, high: float) -> Scale:
        scale = Scale(0, high, top + height, top)
        self.axis(scale, (0, high / 2, high) if height > 50 else (0, high), plot.short_number)
        return scale


def draw_timeline(run: Run, frame: Frame) -> str:
    """The SVG of one policy."""
    canvas = _Canvas(frame, Scale(0, frame.end_s, _LEFT, WIDTH - _RIGHT))
    _draw_offered(canvas)
    _draw_first_tokens(canvas, run)
    if run.states:
        _draw_cache(canvas, run)
        _draw_layers(canvas, run)
        _draw_requests(canvas, run)
        _draw_preemptions(canvas, run)
    bottom = canvas.y - _GAP
    body = _draw_burst(canvas, bottom) + "".join(canvas.parts) + _draw_time_axis(canvas, bottom)
    label = f"{run.policy} over time"
    size = f'viewBox="0 0 {WIDTH} {bottom + 34:g}"'
    return f'<svg {size} role="img" aria-label="{label}">{body}</svg>'


def _draw_burst(canvas: _Canvas, bottom: float) -> str:
    burst = canvas.frame.burst
    if burst is None:
        return ""
    x, end = canvas.x(burst.start_s), canvas.x(burst.end_s)
    shade = plot.rect(x, _TOP + _TITLE, end - x, bottom - _TOP - _TITLE, "burst")
    return shade + plot.text((x + end) / 2, 12, "burst", "burst-label", "middle")


def _draw_time_axis(canvas: _Canvas, bottom: float) -> str:
    step = next(s for s in (5, 10, 20, 30, 60, 120, 300, 600, 1e9) if canvas.frame.end_s / s <= 8)
    marks = [plot.line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "base")]
    at = 0.0
    while at <= canvas.frame.end_s:
        anchor = "start" if at == 0 else "middle"
        label = "0 s" if at == 0 else plot.short_number(at)
        marks.append(plot.text(canvas.x(at), bottom + 14, label, "tick", anchor))
        at += step
    marks.append(plot.text(WIDTH - _RIGHT, bottom + 29, "seconds since the start", "tick", "end"))
    return "".join(marks)


def _draw_offered(canvas: _Canvas) -> None:
    height = 44
    top = canvas.panel("requests arriving per second", [], height)
    rates = canvas.frame.rates
    y = canvas.linear(top, height, plot.nice_ceiling(max(rates)))
    width = max(0.5, canvas.x(1) - canvas.x(0) - 0.6)
    for second, count in enumerate(rates):
        if count:
            at = y(count)
            title = f"second {second}: {count} requests"
            canvas.parts.append(
                plot.rect(canvas.x(second), at, width, top + height - at, "offered", title)
            )


def _draw_first_tokens(canvas: _Canvas, run: Run) -> None:
    height, slo = 120, canvas.frame.slo
    legend = [("● in target", "key good"), ("● missed", "key bad"), ("× no answer", "key bad")]
    top = canvas.panel("time to first token", legend, height)
    y = Scale(_FASTEST_S, canvas.frame.slowest_s, top + height, top, log=True)
    ticks = [t for t in (0.01, 0.1, 1.0, 10.0, 100.0) if t <= canvas.frame.slowest_s]
    canvas.axis(y, ticks, show_s)
    for o in run.outcomes:
        x = canvas.x(o.sent_s)
        about = f"request {o.index}, sent at {o.sent_s:.1f} s, {o.prompt_tokens} prompt tokens: "
        if o.ttft_s is None:
            canvas.parts.append(plot.cross(x, top + 3, "cross", about + (o.error or "no token")))
        else:
            css = "good" if meets(o, slo) else "bad"
            canvas.parts.append(plot.dot(x, y(o.ttft_s), css, about + show_s(o.ttft_s)))
    if slo.ttft_s is not None:
        at = y(slo.ttft_s)
        canvas.parts.append(plot.line(_LEFT, at, WIDTH - _RIGHT, at, "target"))
        label = f"target {show_s(slo.ttft_s)}"
        canvas.parts.append(plot.text(WIDTH - _RIGHT, at - 4, label, "target-label", "end"))


def _steps(
    canvas: _Canvas, run: Run, value: Callable[[State], float], y: Scale
) -> list[tuple[float, float]]:
    return [(canvas.x(run.at_s(s)), y(value(s))) for s in run.states if run.at_s(s) >= 0]


def _draw_cache(canvas: _Canvas, run: Run) -> None:
    height = 110
    legend = [("used", "key used-key"), ("capacity", "key"), ("at full precision", "key muted")]
    top = canvas.panel("KV cache, tokens", legend, height)
    y = canvas.linear(top, height, canvas.frame.kv_tokens)
    used = _steps(canvas, run, lambda s: s.blocks_used * s.block_tokens, y)
    capacity = _steps(canvas, run, lambda s: s.blocks_capacity * s.block_tokens, y)
    full = run.states[0].blocks_full * run.states[0].block_tokens
    canvas.parts.append(plot.steps(used, "used", floor=top + height))
    canvas.parts.append(plot.line(_LEFT, y(full), WIDTH - _RIGHT, y(full), "reference"))
    canvas.parts.append(plot.steps(capacity, "capacity"))


def _draw_layers(canvas: _Canvas, run: Run) -> None:
    num_layers = len(run.states[0].layers)
    row = min(9.0, max(1.5, 96 / num_layers))
    legend = [("■ full", "key full-key"), ("■ INT4", "key int4-key")]
    top = canvas.panel("precision of each layer", legend, row * num_layers)
    end = run.at_s(run.states[-1])
    for layer in range(num_layers):
        y = top + layer * row
        samples = ((max(0.0, run.at_s(s)), _layer_class(s, layer)) for s in run.states)
        for start, stop, css in plot.spans(samples, end):
            x = canvas.x(start)
            title = f"layer {layer}: {css}, {start:.1f} to {stop:.1f} s"
            width = canvas.x(stop) - x
            canvas.parts.append(plot.rect(x, y + 0.5, width, row - 1, f"layer {css}", title))
    for layer in (0, num_layers - 1):
        y = top + (layer + 0.5) * row + 3.5
        canvas.parts.append(plot.text(_LEFT - 6, y, f"layer {layer}", "tick", "end"))


def _layer_class(state: State, layer: int) -> str:
    return "moving" if layer in state.swapping else state.layers[layer].value


def _draw_requests(canvas: _Canvas, run: Run) -> None:
    height = 70
    legend = [("running", "key running-key"), ("waiting", "key waiting-key")]
    top = canvas.panel("requests in the server", legend, height)
    y = canvas.linear(top, height, canvas.frame.requests)
    waiting = _steps(canvas, run, lambda s: s.waiting, y)
    canvas.parts.append(plot.steps(waiting, "waiting-area", floor=top + height))
    canvas.parts.append(plot.steps(waiting, "waiting"))
    canvas.parts.append(plot.steps(_steps(canvas, run, lambda s: s.running, y), "running"))


def _draw_preemptions(canvas: _Canvas, run: Run) -> None:
    height = 34
    counts = _preempted(run)
    top = canvas.panel("preemptions per second", [(f"{counts.total()} in all", "key")], height)
    y = canvas.linear(top, height, canvas.frame.preemptions)
    width = max(0.5, canvas.x(1) - canvas.x(0) - 0.6)
    for second, count in counts.items():
        if count:
            at = y(count)
            title = f"second {second}: {count} preemptions"
            x = canvas.x(second)
            canvas.parts.append(plot.rect(x, at, width, top + height - at, "preempted", title))
