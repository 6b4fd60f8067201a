"""Counts what happens in the engine and turns it into the controller's signals."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from morphserve.configs.schema import Policy, Slo
from morphserve.quantize.manifest import Variant
from morphserve.runtime.forecast import Forecaster
from morphserve.runtime.ladder import DEPTH
from morphserve.runtime.load import Load, most_urgent, running_load
from morphserve.runtime.messages import SLOW, Event
from morphserve.runtime.parts import SYSTEM_CLOCK, Clock
from morphserve.runtime.scheduler import Batch, Scheduler, Slice
from morphserve.runtime.signals import NEVER, Signals
from morphserve.runtime.windows import Rolling

_RATE_S = 10.0  # over which arrivals and tokens per second are counted


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while an engine lives."""

    capacities: Sequence[int]  # blocks at rung 0, 1, ... the deepest allowed
    int8_rung: int  # the deepest of these without an INT4 layer
    block_tokens: int
    max_step_tokens: int


_TELL_PREEMPTIONS_S = 1.0  # between two events that tell of preemptions
_SLOW_FOR_S = 10.0  # that steps have taken far too long before an event tells of it
_TELL_SLOW_S = 60.0  # between two of these


class Monitor:
    """Every update is O(1); counters count from the engine's start."""

    def __init__(
        self,
        policy: Policy,
        slo: Slo,
        facts: Facts,
        forecaster: Forecaster | None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._policy, self._slo, self._facts = policy, slo, facts
        self._forecaster = forecaster
        self._clock = clock
        self.arrivals = Rolling(_RATE_S)
        self._made = Rolling(policy.quality_window_s)  # tokens
        self._made_int4 = Rolling(policy.quality_window_s)  # of these, with an INT4 layer
        self._arrived_s = NEVER
        self._slow_since_s: float | None = None  # when steps began to take far too long
        self._told_slow_s = NEVER
        self._expected: float | None = None  # slowdown of steps that are skipped
        self._latest: Batch = []
        self._latest_variants: tuple[Variant, ...] = ()
        self.prompt_tokens = 0
        self.generated_tokens: Counter[Variant] = Counter()  # by the lowest precision of the step
        self.steps = 0
        self.step_s = 0.0
        self.swaps = 0
        self._events: list[Event] = []  # not yet taken
        self._num_events = 0
        self._num_preemptions = 0
        self._preemptions_told = 0  # by events
        self._told_s = NEVER  # when the latest of these events was
        self._preempted_s = NEVER
        self._blocked_since_s: float | None = None

    def event(self, kind: str, text: str, numbers: dict[str, float] | None = None) -> None:
        self._num_events += 1
        self._events.append(
            Event(self._num_events, self._clock.epoch_s(), kind, text, numbers or {})
        )

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
            self._num_preemptions = scheduler.num_preemptions
        untold = self._num_preemptions - self._preemptions_told
        if untold and now_s - self._told_s >= _TELL_PREEMPTIONS_S:
            self._told_s, self._preemptions_told = now_s, self._num_preemptions
            self.event("preempt", f"{untold} preempted, to be computed again")
        if not scheduler.memory_blocked:
            self._blocked_since_s = None
        elif self._blocked_since_s is None:
            self._blocked_since_s = now_s

    def arrived(self, now_s: float) -> None:
        """Notes a request that was taken."""
        self._arrived_s = now_s
        self.arrivals.add(now_s, 1)

    def stepped(
        self,
        batch: Batch,
        generated: int,
        variants: Sequence[Variant],
        precision: Variant,
        now_s: float,
        step_s: float,
    ) -> None:
        """Notes a step through layers of these variants, the lowest of which is `precision`.

        `generated` tokens of it are told: some requests end while theirs is computed, or get none.
        """
        self.generated_tokens[precision] += generated
        self._note_share(generated, precision, now_s)
        prefills = [piece for piece in batch if piece.start < len(piece.request.prompt)]
        self.prompt_tokens += sum(map(_new_prompt_tokens, prefills))
        self.steps += 1
        self.step_s = step_s
        self._latest, self._latest_variants = batch, tuple(variants)

    def skipped(self, steps: int, generated: int, precision: Variant, now_s: float) -> None:
        """Notes steps that a simulation did at once, the latest one at `now_s`."""
        self.generated_tokens[precision] += generated
        if self._policy.max_demoted_token_share < 1:
            self._note_share(generated, precision, now_s)
        self.steps += steps
        self._latest = []

    def expect(self, slowdown: float) -> None:
        """Takes the slowdown of steps that are skipped for known; others are measured."""
        self._expected = slowdown
        if self._forecaster is not None:
            self._forecaster.slowdown = slowdown

    def _note_share(self, count: int, precision: Variant, now_s: float) -> None:
        self._made.add(now_s, count)
        self._made_int4.add(now_s, count if precision is Variant.INT4 else 0)

    def signals(
        self,
        now_s: float,
        scheduler: Scheduler,
        rung: int,
        settled: bool,
    ) -> Signals:
        """What the controller is to see."""
        policy, facts = self._policy, self._facts
        load = running_load(scheduler.running, policy.horizon_tokens, facts.block_tokens, self._slo)
        busy = bool(scheduler.running or scheduler.waiting)
        decode_s, chunk_s = self._forecasts(load) if busy else ((), ())
        urgent = most_urgent(
            scheduler.waiting,
            load,
            self._slo,
            max(1, facts.max_step_tokens - load.num_decodes),
            chunk_s[rung] if chunk_s else 0.0,
            now_s,
        )
        blocked, last = self._blocked_since_s, len(facts.capacities) - 1
        return Signals(
            now_s=now_s,
            rung=rung,
            demand=scheduler.demand(policy.horizon_tokens),
            running_demand=scheduler.num_used + load.growth,
            # Rungs at which nobody may run who wants blocks are of no use.
            capacities=facts.capacities[: max(rung, scheduler.useful_rung(last)) + 1],
            settled=settled,
            memory_wait_s=0.0 if blocked is None else now_s - blocked,
            preemption_age_s=now_s - self._preempted_s,
            arrival_age_s=now_s - self._arrived_s,
            waiting=len(scheduler.waiting) + len(scheduler.held),
            held=scheduler.num_held,
            int8_rung=facts.int8_rung,
            token_share=self.token_share(now_s),
            tpot_target_s=load.tpot_target_s,
            urgent=urgent if chunk_s else None,
            decode_s=decode_s,
            chunk_s=chunk_s,
        )

    def token_share(self, now_s: float) -> float:
        """Of the tokens generated in the quality window, those made with INT4 layers."""
        made, made_int4 = self._made.total(now_s), self._made_int4.total(now_s)
        return made_int4 / made if made else 0.0

    @property
    def slowdown(self) -> float | None:
        return None if self._forecaster is None else self._forecaster.slowdown

    def predicted_step_s(self) -> float | None:
        """What the cost model says of the latest step; None without measured costs."""
        if self._forecaster is None or not self._latest:
            return None
        spans = [(piece.start, piece.end) for piece in self._latest]
        return self._forecaster.step_seconds(self._latest_variants, spans)

    def _forecasts(self, load: Load) -> tuple[Sequence[float], Sequence[float]]:
        """Decode steps and steps with a chunk of prefill, at each rung."""
        forecaster = self._forecaster
        if forecaster is None:
            return (), ()
        if predicted := self.predicted_step_s():
            forecaster.observe(self.step_s, predicted)
            self._watch_pace(forecaster.pace, self._clock.now_s())
        elif self._expected is not None:
            forecaster.observe(self._expected, 1.0)
        batch = max(1, load.num_decodes), load.context_tokens
        return forecaster.decode_s(*batch), forecaster.chunk_s(*batch)

    def _watch_pace(self, pace: float, now_s: float) -> None:
        if pace < SLOW:
            self._slow_since_s = None
            return
        if self._slow_since_s is None:
            self._slow_since_s = now_s
        if now_s - self._slow_since_s >= _SLOW_FOR_S and now_s - self._told_slow_s >= _TELL_SLOW_S:
            self._told_slow_s = now_s
            text = f"steps take {pace:.1f} times what was measured on this device: look for what "
            self.event("slow", text + "else it does, and at the log of its start", {"pace": pace})


def _new_prompt_tokens(piece: Slice) -> int:
    """Prompt tokens computed for the first time: what a preemption threw away counts once."""
    if piece.request.num_preemptions:
        return 0
    return min(piece.end, len(piece.request.prompt)) - piece.start
