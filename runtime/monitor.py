"""Counts what happens in the engine and turns it into the controller's signals."""

import time
from collections import Counter
from collections.abc import Sequence

from morphserve.quantize.manifest import Variant
from morphserve.runtime.controller import Signals
from morphserve.runtime.ladder import DEPTH
from morphserve.runtime.messages import Event
from morphserve.runtime.scheduler import Batch, Scheduler, Slice


class Monitor:
    """Every update is O(1); counters count from the engine's start."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generated_tokens: Counter[Variant] = Counter()  # by the lowest precision of the step
        self.steps = 0
        self.step_s = 0.0
        self.swaps = 0
        self._events: list[Event] = []  # not yet taken
        self._num_events = 0
        self._num_preemptions = 0
        self._preemptions_told = 0  # before the latest event that tells of some
        self._preempted_s = float("-inf")
        self._blocked_since_s: float | None = None

    def event(self, kind: str, text: str, numbers: dict[str, float] | None = None) -> None:
        self._num_events += 1
        self._events.append(Event(self._num_events, time.time(), kind, text, numbers or {}))

    def take_events(self) -> list[Event]:
        """What has happened since the last call."""
        events, self._events = self._events, []
        return events

    def swapped(self, layer: int, was: Variant, to: Variant, capacity: int) -> None:
        """Notes a swap that was committed."""
        kind = "demote" if DEPTH[to] > DEPTH[was] else "promote"
        self.event(kind, f"layer {layer} is {to.value}, {capacity} blocks")
        self.swaps += 1

    def scheduled(self, scheduler: Scheduler, now_s: float) -> None:
        """Notes what the scheduler ran into while it made a batch."""
        if scheduler.num_preemptions > self._num_preemptions:
            self._preempted_s = now_s
            if not self._events or self._events[-1].kind != "preempt":
                self._preemptions_told = self._num_preemptions
            else:
                self._events.pop()  # one line for a row of preemptions
            self._num_preemptions = scheduler.num_preemptions
            count = self._num_preemptions - self._preemptions_told
            self.event("preempt", f"{count} preempted, to be computed again")
        if not scheduler.memory_blocked:
            self._blocked_since_s = None
        elif self._blocked_since_s is None:
            self._blocked_since_s = now_s

    def stepped(self, batch: Batch, precision: Variant, step_s: float) -> None:
        """Notes a step that was carried out."""
        self.generated_tokens[precision] += sum(piece.samples for piece in batch)
        self.prompt_tokens += sum(map(_new_prompt_tokens, batch))
        self.steps += 1
        self.step_s = step_s

    def signals(
        self, now_s: float, demand: int, rung: int, capacities: Sequence[int], settled: bool
    ) -> Signals:
        blocked = self._blocked_since_s
        return Signals(
            now_s=now_s,
            rung=rung,
            demand=demand,
            capacities=capacities,
            settled=settled,
            memory_wait_s=0.0 if blocked is None else now_s - blocked,
            preemption_age_s=now_s - self._preempted_s,
        )


def _new_prompt_tokens(piece: Slice) -> int:
    """Prompt tokens computed for the first time: what a preemption threw away counts once."""
    if piece.request.num_preemptions:
        return 0
    return max(0, min(piece.end, len(piece.request.prompt)) - piece.start)
