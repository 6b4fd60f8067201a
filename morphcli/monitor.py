"""What a running server shows of itself: a live view on a terminal, else a line per interval."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from morphserve.quantize.manifest import Variant
from morphserve.runtime.ladder import DEPTH
from morphserve.runtime.messages import Event, Snapshot
from morphserve.runtime.metrics import Latency, Percentiles
from morphserve.runtime.server.run import Watch
from morphserve.runtime.server.serving import Serving

REFRESH_S = 0.25
HISTORY_S = 0.5  # between two points of the KV rows
_MAX_POINTS = 400
_EVENTS = 5
_BARS = " ▁▂▃▄▅▆▇█"
_LAYERS = {  # glyph and style of each state
    "full": ("■", "green"),
    "int8": ("▪", "blue"),
    "int4": ("▪", "yellow"),
    "demoting": ("▼", "bold magenta"),
    "promoting": ("▲", "bold cyan"),
}


def choose_watch(no_monitor: bool, log_interval_s: float) -> Watch:
    """The live view if stderr is a terminal and nobody declined it, else log lines."""
    console = Console(stderr=True)
    if no_monitor or not console.is_terminal:
        return lambda serving: watch_log(serving, log_interval_s)
    return lambda serving: watch_live(serving, console)


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second between two snapshots."""

    prompt: float
    generation: float

    @classmethod
    def between(cls, before: Snapshot, now: Snapshot) -> "Rates":
        seconds = max(now.time - before.time, 1e-9)
        prompt = now.prompt_tokens - before.prompt_tokens
        generation = now.num_generated - before.num_generated
        return cls(prompt / seconds, generation / seconds)


async def watch_log(serving: Serving, interval_s: float) -> None:
    """A line per interval; an idle server says so once."""
    before, was_idle = serving.engine.snapshot, False
    while True:
        await asyncio.sleep(interval_s)
        now = serving.engine.snapshot
        is_idle = now.running + now.waiting == 0 and now.steps == before.steps
        if not (is_idle and was_idle):
            stamp = time.strftime("%H:%M:%S", time.localtime(now.time))
            print(f"{stamp} {log_line(now, Rates.between(before, now))}", file=sys.stderr)
        before, was_idle = now, is_idle


def log_line(now: Snapshot, rates: Rates) -> str:
    return (
        f"Avg prompt throughput: {rates.prompt:.1f} tokens/s, "
        f"Avg generation throughput: {rates.generation:.1f} tokens/s, "
        f"Running: {now.running} reqs, Waiting: {now.waiting} reqs, "
        f"Preemptions: {now.preemptions}, KV cache usage: {_share(now):.1%} "
        f"of {now.blocks_capacity} blocks, INT4 layers: {_num_int4(now)}/{len(now.layers)}"
    )


async def watch_live(serving: Serving, console: Console) -> None:
    """The live view, redrawn four times a second; its last state stays when it ends."""
    view = View(serving.model_name, serving.url)
    try:
        # On a screen of its own: a resized terminal leaves no old lines behind.
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                view.update(
                    serving.engine.snapshot, serving.metrics.latency(), list(serving.engine.events)
                )
                live.update(view.render(console.width), refresh=True)
                await asyncio.sleep(REFRESH_S)
    finally:
        console.print(view.render(console.width))


@dataclass(slots=True)
class View:
    """What the live view remembers between two redraws."""

    model: str
    url: str = ""
    history: deque[Snapshot] = field(default_factory=lambda: deque(maxlen=_MAX_POINTS))
    now: Snapshot | None = None
    latency: Latency = Latency(None, None)
    events: Sequence[Event] = ()

    def update(self, now: Snapshot, latency: Latency, events: Sequence[Event] = ()) -> None:
        self.now, self.latency, self.events = now, latency, events[-_EVENTS:]
        if not self.history or now.time - self.history[-1].time >= HISTORY_S:
            self.history.append(now)

    def render(self, width: int) -> RenderableType:
        assert self.now is not None, "update comes before render"
        now = self.now
        parts: list[RenderableType] = [
            _header(self.model, self.url, now),
            _layer_map(now),
            *_kv_rows(list(self.history), now, width),
            _queue(now, self._rates(now)),
            _latency_table(self.latency),
            *_events(self.events, width),
        ]
        return Group(*parts)

    def _rates(self, now: Snapshot) -> Rates:
        """Over the last two seconds or so."""
        recent = [point for point in self.history if now.time - point.time <= 2.0]
        return Rates.between(recent[0] if recent else now, now)


def _header(model: str, url: str, now: Snapshot) -> Text:
    return Text.assemble(
        (f"morph serve {model}", "bold"),
        f"  policy {now.policy}  ",
        (f"INT4 {_num_int4(now)}/{len(now.layers)}", "yellow" if _num_int4(now) else "green"),
        f"  rung {now.rung} of {now.target_rung} wanted  {url}",
        overflow="ellipsis",
        no_wrap=True,
    )


def _layer_map(now: Snapshot) -> Text:
    """One cell per layer, in the order of the model."""
    states = [_layer_state(now, layer) for layer in range(len(now.layers))]
    cells = [(f"{_LAYERS[state][0]} ", _LAYERS[state][1]) for state in states]
    legend = [(f"  {glyph} {state}", style) for state, (glyph, style) in _LAYERS.items()]
    return Text.assemble("layers  ", *cells, *legend)


def _layer_state(now: Snapshot, layer: int) -> str:
    variant, to = now.layers[layer], now.swapping.get(layer)
    if to is None:
        return variant.value
    return "demoting" if DEPTH[to] > DEPTH[variant] else "promoting"


def _kv_rows(history: Sequence[Snapshot], now: Snapshot, width: int) -> list[Text]:
    """Used and capacity over time on one scale, so that growth shows, and their numbers."""
    points = history[-max(1, width - len("KV capacity ")) :]
    top = max(now.blocks_max, 1)
    used = "".join(_bar(point.blocks_used / top) for point in points)
    capacity = "".join(_bar(point.blocks_capacity / top) for point in points)
    numbers = (
        f"KV blocks {now.blocks_used} used of {now.blocks_capacity} now "
        f"({now.blocks_full} at full precision, {now.blocks_max} at most)"
    )
    return [
        Text.assemble("KV capacity ", (capacity, "cyan"), no_wrap=True),
        Text.assemble("KV used     ", (used, "blue"), no_wrap=True),
        Text(numbers),
    ]


def _bar(share: float) -> str:
    """Blank for nothing only."""
    least = 1 if share > 0 else 0
    return _BARS[min(len(_BARS) - 1, max(least, round(share * (len(_BARS) - 1))))]


def _queue(now: Snapshot, rates: Rates) -> Text:
    waiting = f"{now.waiting} waiting"
    if now.waiting:
        waiting += f" (oldest {now.oldest_wait_s:.1f} s)"
    preemptions = f"{now.preemptions} preemption{'' if now.preemptions == 1 else 's'}"
    return Text(
        f"{now.running} running  {waiting}  {preemptions}\n"
        f"{rates.prompt:.0f} prompt tok/s  {rates.generation:.0f} generation tok/s"
    )


def _latency_table(latency: Latency) -> Table:
    table = Table("last minute", "p50", "p95", "p99", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("TTFT", *_milliseconds(latency.ttft_s))
    table.add_row("TPOT", *_milliseconds(latency.tpot_s))
    return table


def _milliseconds(values: Percentiles | None) -> list[str]:
    if values is None:
        return ["–"] * 3
    return [f"{value * 1000:.0f} ms" for value in (values.p50, values.p95, values.p99)]


def _events(events: Sequence[Event], width: int) -> list[Text]:
    lines = []
    for event in events:
        stamp = time.strftime("%H:%M:%S", time.localtime(event.time))
        line = Text(f"{stamp} {event.kind:<9} {event.text}", style="dim", no_wrap=True)
        line.truncate(width, overflow="ellipsis")
        lines.append(line)
    return lines


def _num_int4(now: Snapshot) -> int:
    """Layers that compute in INT4 now: one on its way down still runs at full precision."""
    return now.layers.count(Variant.INT4)


def _share(now: Snapshot) -> float:
    return now.blocks_used / now.blocks_capacity if now.blocks_capacity else 0.0
