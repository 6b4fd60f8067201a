"""Builds the parts once, then turns the step loop."""

import logging
import random
import time

import msgspec

from morphserve.configs.schema import EngineConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import Parts, build
from morphserve.runtime.control import Control
from morphserve.runtime.ladder import DEPTH, lowest
from morphserve.runtime.messages import Event, Hello, Refused, Snapshot, Step, Submit, TokenOutput
from morphserve.runtime.monitor import Monitor
from morphserve.runtime.request import FinishReason, Request, SamplingParams
from morphserve.runtime.scheduler import Batch

logger = logging.getLogger(__name__)


class Engine:
    """One model, its requests, and the layers that change precision under them.

    Not thread-safe: one thread submits, aborts and steps.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._policy = config.policy
        self._parts: Parts = build(config)
        self._monitor = Monitor()
        self._seeds = random.Random(config.seed)  # for requests that bring none
        self._control = Control(self._policy, target=self._rung)

    def hello(self) -> Hello:
        return self._parts.hello

    def submit(self, message: Submit) -> Refused | None:
        """Queues a request, or says why it can never be served."""
        prompt, params = message.prompt, message.params
        if reason := self._never(len(prompt), params.max_tokens):
            return Refused(message.request_id, reason)
        vocab = self._parts.architecture.vocab_size
        if not all(0 <= t < vocab for t in (*prompt, *params.stop_token_ids)):
            return Refused(message.request_id, f"token ids must lie between 0 and {vocab - 1}")
        self._parts.scheduler.add(
            Request(
                message.request_id,
                prompt,
                self._seeded(params),
                time.monotonic(),
                message.demands,
            )
        )
        return None

    def abort(self, request_id: str) -> None:
        self._parts.scheduler.abort(request_id)

    def pin(self, rung: int | None) -> None:
        """Holds a rung, whatever the traffic; None lets the controller decide again."""
        if event := self._control.pin(rung, len(self._parts.hello.capacities) - 1):
            self._monitor.event("pin", event)

    def take_events(self) -> list[Event]:
        """What has happened since the last call."""
        return self._monitor.take_events()

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
            layers=list(parts.layers.variants),
            swapping={swap.layer: swap.to for swap in parts.swapper.in_flight},
            rung=self._rung,
            target_rung=self._control.target,
            pinned=self._control.pinned,
            blocks_used=parts.pool.num_used,
            blocks_cached=0,
            blocks_capacity=parts.pool.capacity,
            blocks_full=parts.hello.capacities[0],
            blocks_max=parts.hello.capacities[-1],
            block_tokens=parts.hello.block_tokens,
            demand=scheduler.demand(self._policy.horizon_tokens),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            oldest_wait_s=0.0 if oldest is None else time.monotonic() - oldest,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=monitor.prompt_tokens,
            generated_tokens=dict(monitor.generated_tokens),
            prefix_queries=0,
            prefix_hits=0,
            swaps=monitor.swaps,
            steps=monitor.steps,
            step_s=monitor.step_s,
            predicted_step_s=None,
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
        for failure in self._parts.swapper.failures:
            self._monitor.event("swap_failed", failure)
            self._control.swap_failed(self._rung, time.monotonic())
        self._parts.swapper.failures.clear()

    def _decide(self, now_s: float) -> None:
        if not self._control.is_due(now_s):
            return
        demand = self._parts.scheduler.demand(self._policy.horizon_tokens)
        settled = self._rung == self._control.target and not self._parts.swapper.in_flight
        signals = self._monitor.signals(
            now_s, demand, self._control.target, self._parts.hello.capacities, settled
        )
        if decision := self._control.look(signals):
            self._monitor.event("decision", decision.reason)

    def _start_swaps(self) -> None:
        """Starts what leads to the target rung, never both directions at once."""
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
                return

    def _run(self, batch: Batch, started: float) -> Step:
        precision = lowest(self._parts.layers.variants)
        try:
            tokens = self._parts.runner.run(batch)
        except Exception as error:
            logger.exception("a step failed; its %d requests end with an error", len(batch))
            self._monitor.event("error", f"a step failed: {error}")
            failed = self._parts.scheduler.fail(batch)
            return Step(precision, [_output(request, []) for request in failed])
        self._monitor.stepped(batch, precision, time.monotonic() - started)
        outputs = self._parts.scheduler.update(batch, tokens)
        return Step(precision, [_output(request, new) for request, new in outputs])


def _output(request: Request, tokens: list[int]) -> TokenOutput:
    reason: FinishReason | None = request.finish_reason
    queued_s = 0.0
    if request.scheduled_s is not None and len(request.output) == len(tokens):  # its first
        queued_s = request.scheduled_s - request.arrival_s
    return TokenOutput(
        request.id, tokens, None if reason is None else reason.value, queued_s=queued_s
    )
