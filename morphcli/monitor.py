"""What a running server tells in its log: a line per interval, and what happens as it happens."""

import asyncio
import logging
from collections import deque

import msgspec

from morphserve.quantize.manifest import Variant
from morphserve.runtime.latency import Rates
from morphserve.runtime.messages import Event, Snapshot
from morphserve.runtime.server.logs import say
from morphserve.runtime.server.serving import Serving

_EVENTS_S = 0.2  # between two looks for events


async def watch_log(serving: Serving, interval_s: float) -> None:
    """Logs until it is cancelled."""
    async with asyncio.TaskGroup() as group:
        group.create_task(_log_intervals(serving, interval_s))
        group.create_task(_log_events(serving))


async def _log_intervals(serving: Serving, interval_s: float) -> None:
    """A line per interval; an idle server says so once."""
    before, was_idle = serving.engine.snapshot, False
    while True:
        await asyncio.sleep(interval_s)
        now = serving.engine.snapshot
        is_idle = now.running + now.waiting == 0 and now.steps == before.steps
        if not (is_idle and was_idle):
            rates = Rates.between(before, now)
            say("interval", log_line(now, rates), interval_fields(now, rates))
        before, was_idle = now, is_idle


async def _log_events(serving: Serving) -> None:
    told: Event | None = None
    try:
        while True:
            told = _tell(told, serving.engine.events)
            await asyncio.sleep(_EVENTS_S)
    finally:
        _tell(told, serving.engine.events)


def _tell(told: Event | None, events: deque[Event]) -> Event | None:
    """Logs what came after `told`; the latest event that is told now."""
    for event in _after(told, events):
        level = logging.WARNING if event.kind == "engine" else logging.INFO
        say("event", event_line(event), {"event": msgspec.to_builtins(event)}, level)
        told = event
    return told


def _after(told: Event | None, events: deque[Event]) -> list[Event]:
    """The events that came after `told`, oldest first."""
    new = []
    for event in reversed(events):
        if event is told:
            break
        new.append(event)
    return new[::-1]


def event_line(event: Event) -> str:
    """What happened, with the numbers behind it."""
    numbers = " ".join(f"{name}={value:.6g}" for name, value in event.numbers.items())
    return f"{event.kind}: {event.text}" + (f" ({numbers})" if numbers else "")


def log_line(now: Snapshot, rates: Rates) -> str:
    return (
        f"Avg prompt throughput: {rates.prompt:.1f} tokens/s, "
        f"Avg generation throughput: {rates.generation:.1f} tokens/s, "
        f"Running: {now.running} reqs, Waiting: {now.waiting} reqs, "
        f"Preemptions: {now.preemptions}, KV cache usage: {_share(now):.1%} "
        f"of {now.blocks_capacity} blocks, INT4 layers: {_num_int4(now)}/{len(now.layers)}"
        f"{_step(now)}"
    )


def _step(now: Snapshot) -> str:
    """The latest step's time beside what the cost model said of it."""
    if not now.predicted_step_s:
        return ""
    return f", Step: {now.step_s * 1e3:.3g} ms, predicted {now.predicted_step_s * 1e3:.3g} ms"


def interval_fields(now: Snapshot, rates: Rates) -> dict[str, object]:
    """The same for programs."""
    return {
        "prompt_tokens_per_s": rates.prompt,
        "generation_tokens_per_s": rates.generation,
        "running": now.running,
        "waiting": now.waiting,
        "preemptions": now.preemptions,
        "kv_cache_usage": _share(now),
        "kv_blocks_capacity": now.blocks_capacity,
        "rung": now.rung,
        "layers": {variant.value: now.layers.count(variant) for variant in Variant},
        "step_s": now.step_s,
        "predicted_step_s": now.predicted_step_s,
    }


def _num_int4(now: Snapshot) -> int:
    """Layers that compute in INT4 now: one on its way down still runs at full precision."""
    return now.layers.count(Variant.INT4)


def _share(now: Snapshot) -> float:
    return now.blocks_used / now.blocks_capacity if now.blocks_capacity else 0.0
