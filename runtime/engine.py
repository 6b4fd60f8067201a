"""Turns the step loop over parts that it is given."""

import random

import msgspec

from morphserve.configs.schema import EngineConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.control import Control
from morphserve.runtime.forecast import forecaster
from morphserve.runtime.in_flight import Steps
from morphserve.runtime.ladder import DEPTH, lowest
from morphserve.runtime.messages import (
    Event,
    Hello,
    Refused,
    Snapshot,
    Step,
    Submit,
)
from morphserve.runtime.monitor import Facts, Monitor
from morphserve.runtime.parts import SYSTEM_CLOCK, Clock, Parts
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.signals import numbers


class Engine:
    """One model, its requests, and the layers that change precision under them.

    Not thread-safe: one thread submits, aborts and steps.
    """

    def __init__(self, config: EngineConfig, parts: Parts, clock: Clock = SYSTEM_CLOCK) -> None:
        self._policy = config.policy
        self._parts = parts
        self._clock = clock
        self._monitor = _monitor(config, parts, clock)
        self._steps = Steps(parts, self._monitor, clock)
        self._seeds = random.Random(config.seed)  # for requests that bring none
        self._control = Control(self._policy, target=self._rung)
        self._computing_rung = parts.ladder.rung_of(parts.layers.variants)
        self._precision = lowest(parts.layers.variants)
        self._max_rungs = {variant: self._max_rung(variant) for variant in Variant}
        self._arrived_at: int | None = None  # the target at which nothing was left to swap

    def hello(self) -> Hello:
        return self._parts.hello

    def submit(self, message: Submit) -> Refused | None:
        """Queues a request, or says why it can never be served."""
        prompt, params = message.prompt, message.params
        max_rung = self._max_rungs[message.demands.min_precision]
        if reason := self._never(len(prompt), params.max_tokens, max_rung):
            return Refused(message.request_id, reason)
        if not self._knows_tokens(message):
            last = self._parts.vocab_size - 1
            return Refused(message.request_id, f"token ids must lie between 0 and {last}")
        now_s = self._clock.now_s()
        self._monitor.arrived(now_s)
        self._parts.scheduler.add(
            Request(
                message.request_id, prompt, self._seeded(params), now_s, message.demands, max_rung
            )
        )
        return None

    def abort(self, request_id: str) -> None:
        self._parts.scheduler.abort(request_id)

    def pin(self, rung: int | None) -> None:
        """Holds a rung, whatever the traffic; None lets the controller decide again."""
        if self._policy.static_layers >= 0:
            return self._monitor.event("pin", f"policy {self._policy.name} never swaps: no pin")
        if event := self._control.pin(rung, len(self._parts.hello.capacities) - 1):
            self._monitor.event("pin", event)

    def take_events(self) -> list[Event]:
        """What has happened since the last call."""
        return self._monitor.take_events()

    @property
    def has_work(self) -> bool:
        """Whether a step would do more than look whether the rung must change."""
        has_requests = self._parts.scheduler.has_work or self._steps.is_one_in_flight
        return has_requests or bool(self._parts.swapper.in_flight)

    def step(self) -> Step | None:
        """One token for every running request; None if there is nothing to tell.

        Call it when idle too. Where the runner overlaps, what is told is the step before the one
        that is launched.
        """
        started = self._clock.now_s()
        self._commit_swaps()
        self._decide(started)
        if self._control.may_swap(started):
            self._start_swaps()
        self._limit_admission()
        self._steps.tell_ends(self._parts.scheduler.expire(started))
        self._steps.settle_before(self._computing_rung)
        batch = self._parts.scheduler.schedule(self._computing_rung, started)
        self._monitor.scheduled(self._parts.scheduler, started)
        self._parts.swapper.advance()
        self._steps.go_on(batch, self._precision, started)
        return self._steps.take(self._precision)

    def snapshot(self) -> Snapshot:
        parts, monitor, scheduler = self._parts, self._monitor, self._parts.scheduler
        now_s = self._clock.now_s()
        waiting = (*scheduler.waiting, *scheduler.held)
        oldest = min((r.arrival_s for r in waiting), default=None)
        return Snapshot(
            time=self._clock.epoch_s(),
            policy=self._policy.name,
            layers=list(parts.layers.variants),
            swapping={swap.layer: swap.to for swap in parts.swapper.in_flight},
            rung=self._rung,
            target_rung=self._control.target,
            pinned=self._control.pinned,
            blocks_used=parts.pool.num_used,
            blocks_cached=parts.pool.num_cached,
            blocks_capacity=parts.pool.capacity,
            blocks_full=parts.hello.capacities[0],
            blocks_max=parts.hello.capacities[-1],
            block_tokens=parts.hello.block_tokens,
            demand=scheduler.demand(self._policy.horizon_tokens),
            running=len(scheduler.running),
            waiting=len(waiting),
            held=scheduler.num_held,
            oldest_wait_s=0.0 if oldest is None else now_s - oldest,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=monitor.prompt_tokens,
            generated_tokens=dict(monitor.generated_tokens),
            prefix_queries=scheduler.reuse.queries,
            prefix_hits=scheduler.reuse.hits,
            swaps=monitor.swaps,
            steps=monitor.steps,
            step_s=monitor.step_s,
            predicted_step_s=monitor.predicted_step_s(),
            slowdown=monitor.slowdown,
            arrivals_per_s=monitor.arrivals.per_second(now_s),
            int4_token_share=monitor.token_share(now_s),
        )

    def _max_rung(self, min_precision: Variant) -> int | None:
        """The deepest rung that a request may be computed at; None: any that the policy takes."""
        deepest = self._parts.ladder.deepest(min_precision)
        return deepest if deepest < len(self._parts.hello.capacities) - 1 else None

    def _never(self, prompt: int, output: int, max_rung: int | None) -> str | None:
        """Why a request of these many tokens can never be served, or None.

        The budget was refused at start unless its KV cache holds one request of full length.
        """
        if prompt < 1 or output < 1:
            return "a request needs at least one prompt token and max_tokens of at least 1"
        limit = self._parts.max_model_len
        asked = f"{prompt} prompt tokens + max_tokens {output} = {prompt + output}"
        if prompt + output > limit:
            return f"{asked}, more than this model's limit of {limit} tokens"
        if max_rung is not None and self._policy.static_layers > max_rung:
            return (
                f"policy {self._policy.name} keeps layers at a lower precision than this request "
                "allows: ask without a minimum precision"
            )
        return None

    def _knows_tokens(self, message: Submit) -> bool:
        params, vocab = message.params, self._parts.vocab_size
        named = (*message.prompt, *params.stop_token_ids, *params.logit_bias)
        return min(named) >= 0 and max(named) < vocab

    def _seeded(self, params: SamplingParams) -> SamplingParams:
        if params.seed is not None or params.temperature == 0:
            return params
        return msgspec.structs.replace(params, seed=self._seeds.getrandbits(32))

    @property
    def _variants(self) -> list[Variant]:
        """Of each layer: what it computes in, or is on its way to."""
        variants = list(self._parts.layers.variants)
        for swap in self._parts.swapper.in_flight:
            variants[swap.layer] = swap.to
        return variants

    @property
    def _rung(self) -> int:
        return self._parts.ladder.rung_of(self._variants)

    def _commit_swaps(self) -> None:
        for swap in self._parts.swapper.commit_ready():
            capacity = self._parts.pool.capacity
            self._monitor.swapped(swap.layer, swap.was, swap.to, capacity)
            self._control.swap_done()
            self._computing_rung = self._parts.ladder.rung_of(self._parts.layers.variants)
            self._precision = lowest(self._parts.layers.variants)
        for failure in self._parts.swapper.failures:
            self._monitor.event("swap_failed", failure)
            self._control.swap_failed(self._rung, self._clock.now_s())
        self._parts.swapper.failures.clear()

    def _decide(self, now_s: float) -> None:
        if not self._control.is_due(now_s):
            return
        scheduler, target = self._parts.scheduler, self._control.target
        signals = self._monitor.signals(now_s, scheduler, target, self._has_arrived)
        if decision := self._control.look(signals):
            self._monitor.event("decision", decision.reason, numbers(signals, decision.rung))

    @property
    def _has_arrived(self) -> bool:
        """Whether no swap is under way and none is wanted."""
        parts, target = self._parts, self._control.target
        if self._arrived_at != target and not parts.swapper.in_flight:
            if parts.ladder.next_swap(parts.layers.variants, (), target) is None:
                self._arrived_at = target
        return self._arrived_at == target

    def _limit_admission(self) -> None:
        """Requests are admitted as if the target rung were reached, where that has less room."""
        self._parts.scheduler.max_blocks = self._parts.hello.capacities[self._control.target]

    def _start_swaps(self) -> None:
        """Starts what leads to the target rung, never both directions at once."""
        if self._has_arrived:
            return
        self._arrived_at = None
        swapper, ladder = self._parts.swapper, self._parts.ladder
        while swapper.has_room:
            moving = {swap.layer for swap in swapper.in_flight}
            step = ladder.next_swap(self._variants, moving, self._control.target)
            if step is None:
                return
            down = DEPTH[step.to] > DEPTH[self._parts.layers.variants[step.layer]]
            if any(swap.is_demotion is not down for swap in swapper.in_flight):
                return
            if not swapper.start(step.layer, step.to):
                # What runs frees blocks in time. But paused requests would hold theirs until the
                # layers are precise again, and those wait for the blocks.
                if swapper.in_flight or not self._parts.scheduler.yield_paused():
                    return


def _monitor(config: EngineConfig, parts: Parts, clock: Clock) -> Monitor:
    capacities, ladder = parts.hello.capacities, parts.ladder
    max_step_tokens = config.scheduler.max_num_batched_tokens
    facts = Facts(
        capacities=capacities,
        int8_rung=min(ladder.deepest(Variant.INT8), len(capacities) - 1),
        block_tokens=parts.hello.block_tokens,
        max_step_tokens=max_step_tokens,
    )
    forecasts = forecaster(parts.cost_model, ladder, len(capacities), max_step_tokens)
    monitor = Monitor(config.policy, config.slo, facts, forecasts, clock)
    if forecasts is None and config.policy.static_layers < 0 and len(capacities) > 1:
        monitor.event(
            "costs",
            "no measured costs for this device, so that no step times are predicted: run "
            f"`morph profile {config.model} --bundle {config.bundle}`",
        )
    return monitor
