"""Builds the parts once, then turns the step loop."""

import logging
import random
import time

import msgspec

from morphserve.configs.schema import EngineConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import Parts, build
from morphserve.runtime.controller import ControlState, decide
from morphserve.runtime.messages import Hello, Refused, Snapshot, Step, Submit, TokenOutput
from morphserve.runtime.monitor import Monitor
from morphserve.runtime.request import FinishReason, Request, SamplingParams
from morphserve.runtime.scheduler import Batch

logger = logging.getLogger(__name__)


class Engine:
    """One model, its requests, and the layers that change precision under them.

    Not thread-safe: one thread submits, aborts and steps.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._policy = config.policy
        self._parts: Parts = build(config)
        self._monitor = Monitor()
        self._seeds = random.Random(config.seed)  # for requests that bring none
        self._control = ControlState()
        self._looked_s = float("-inf")
        self._failed_swaps = 0  # since the latest one that succeeded
        self._held_until_s = float("-inf")  # no decision before, after a failed swap
        self._target = self._rung

    def hello(self) -> Hello:
        parts = self._parts
        return Hello(
            max_model_len=parts.max_model_len,
            num_layers=parts.architecture.num_layers,
            startup_s=parts.startup_s,
        )

    def submit(self, message: Submit) -> Refused | None:
        """Queues a request, or says why it can never be served."""
        prompt, params = message.prompt, message.params
        if reason := self._never(len(prompt), params.max_tokens):
            return Refused(message.request_id, reason)
        vocab = self._parts.architecture.vocab_size
        if not all(0 <= t < vocab for t in (*prompt, *params.stop_token_ids)):
            return Refused(message.request_id, f"token ids must lie between 0 and {vocab - 1}")
        self._parts.scheduler.add(
            Request(message.request_id, prompt, self._seeded(params), time.monotonic())
        )
        return None

    def abort(self, request_id: str) -> None:
        self._parts.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        scheduler = self._parts.scheduler
        return bool(scheduler.running or scheduler.waiting or self._parts.swapper.in_flight)

    def step(self) -> Step | None:
        """One token for every running request; None if nothing ran. Call it when idle too."""
        started = time.monotonic()
        self._commit_swaps()
        self._decide(started)
        self._start_swaps()
        batch = self._parts.scheduler.schedule()
        self._monitor.scheduled(self._parts.scheduler, started)
        self._parts.swapper.advance()
        return self._run(batch, started) if batch else None

    def snapshot(self) -> Snapshot:
        parts, monitor, scheduler = self._parts, self._monitor, self._parts.scheduler
        oldest = min((r.arrival_s for r in scheduler.waiting), default=None)
        return Snapshot(
            time=time.time(),
            policy=self._policy.name,
            layers=self._layer_states(),
            order=parts.order,
            rung=self._rung,
            target_rung=self._target,
            blocks_used=parts.pool.num_used,
            blocks_capacity=parts.pool.capacity,
            blocks_full=parts.capacities[0],
            blocks_max=parts.capacities[-1],
            block_tokens=self._config.cache.block_tokens,
            demand=scheduler.demand(self._policy.horizon_tokens),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            oldest_wait_s=0.0 if oldest is None else time.monotonic() - oldest,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=monitor.prompt_tokens,
            generated_tokens=monitor.generated_tokens,
            generated_tokens_int4=monitor.generated_tokens_int4,
            swaps=monitor.swaps,
            steps=monitor.steps,
            step_s=monitor.step_s,
            events=list(monitor.events),
        )

    def _never(self, prompt: int, output: int) -> str | None:
        """Why a request of these many tokens can never be served, or None.

        The budget was refused at start unless its KV cache holds one request of full length.
        """
        if prompt < 1 or output < 1:
            return "a request needs at least one prompt token and max_tokens of at least 1"
        limit = self._parts.max_model_len
        asked = f"{prompt} prompt tokens + max_tokens {output} = {prompt + output}"
        if prompt + output > limit:
            return f"{asked}, more than this model's limit of {limit} tokens"
        return None

    def _seeded(self, params: SamplingParams) -> SamplingParams:
        if params.seed is not None or params.temperature == 0:
            return params
        return msgspec.structs.replace(params, seed=self._seeds.getrandbits(32))

    @property
    def _rung(self) -> int:
        """Layers that are INT4 or on their way there."""
        moving = self._parts.swapper.in_flight
        down = sum(swap.to is Variant.INT4 for swap in moving)
        return self._parts.layers.num_int4 + down - (len(moving) - down)

    def _commit_swaps(self) -> None:
        for swap in self._parts.swapper.commit_ready():
            kind = "demote" if swap.to is Variant.INT4 else "promote"
            capacity = self._parts.pool.capacity
            self._monitor.event(kind, f"layer {swap.layer} is {swap.to.value}, {capacity} blocks")
            self._monitor.swaps += 1
            self._failed_swaps = 0
        for failure in self._parts.swapper.failures:
            self._monitor.event("swap_failed", failure)
            self._failed_swaps += 1
            self._target = self._rung
            self._held_until_s = time.monotonic() + min(60.0, 2.0**self._failed_swaps)
        self._parts.swapper.failures.clear()

    def _decide(self, now_s: float) -> None:
        if now_s - self._looked_s < self._policy.window_s or now_s < self._held_until_s:
            return
        self._looked_s = now_s
        demand = self._parts.scheduler.demand(self._policy.horizon_tokens)
        settled = self._rung == self._target and not self._parts.swapper.in_flight
        signals = self._monitor.signals(
            now_s, demand, self._target, self._parts.capacities, settled
        )
        decision, self._control = decide(signals, self._control, self._policy)
        if decision is not None:
            self._target = decision.rung
            self._monitor.event("decision", decision.reason)

    def _start_swaps(self) -> None:
        """Starts what leads to the target rung, never both directions at once."""
        swapper = self._parts.swapper
        while swapper.has_room and self._rung != self._target:
            to = Variant.INT4 if self._target > self._rung else Variant.FULL
            if any(swap.to is not to for swap in swapper.in_flight):
                return
            if not swapper.start(self._next_layer(to), to):
                return

    def _next_layer(self, to: Variant) -> int:
        """Demotion follows the order, promotion goes back along it."""
        order = self._parts.order if to is Variant.INT4 else self._parts.order[::-1]
        moving = {swap.layer for swap in self._parts.swapper.in_flight}
        variants = self._parts.layers.variants
        return next(i for i in order if variants[i] is not to and i not in moving)

    def _run(self, batch: Batch, started: float) -> Step:
        num_int4 = self._parts.layers.num_int4
        try:
            tokens = self._parts.runner.run(batch)
        except Exception as error:
            logger.exception("a step failed; its %d requests end with an error", len(batch))
            self._monitor.event("error", f"a step failed: {error}")
            failed = self._parts.scheduler.fail(batch)
            return Step(num_int4, [_output(request, []) for request in failed])
        self._monitor.stepped(batch, num_int4, time.monotonic() - started)
        outputs = self._parts.scheduler.update(batch, tokens)
        return Step(num_int4, [_output(request, new) for request, new in outputs])

    def _layer_states(self) -> list[str]:
        states = [variant.value for variant in self._parts.layers.variants]
        for swap in self._parts.swapper.in_flight:
            states[swap.layer] = "demoting" if swap.to is Variant.INT4 else "promoting"
        return states


def _output(request: Request, tokens: list[int]) -> TokenOutput:
    reason: FinishReason | None = request.finish_reason
    return TokenOutput(request.id, tokens, None if reason is None else reason.value)
