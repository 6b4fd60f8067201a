"""The engine that serves, on a device of sizes and times: it turns as fast as Python can."""

from dataclasses import replace

from morphserve.configs.schema import EngineConfig
from morphserve.morphcli.bench.server import State
from morphserve.morphcli.simulate.counted import CountedBatch, CountedScheduler
from morphserve.morphcli.simulate.device import SimulatedClock, SimulatedDevice, SimulatedLayers
from morphserve.morphcli.simulate.pool import CountingPool
from morphserve.morphcli.simulate.stretch import Stretch
from morphserve.morphcli.simulate.target import Target
from morphserve.quantize.manifest import Variant
from morphserve.runtime.device.link import PieceLink
from morphserve.runtime.engine import Engine
from morphserve.runtime.ladder import Ladder, steps_of
from morphserve.runtime.layout import DeviceMemory, Layout, lay_out
from morphserve.runtime.memory import ModelSizes
from morphserve.runtime.messages import Step, Submit
from morphserve.runtime.parts import Parts
from morphserve.runtime.swapper import Swapper

_FEW = 64  # waiting requests that are looked at one by one


class SimulatedEngine(Engine):
    """Scheduler, block pool, monitor, controller and swapper are those of the real one."""

    def __init__(self, config: EngineConfig, target: Target, slowdown: float = 1.0) -> None:
        ladder = ladder_of(config, target)
        usable = target.memory_bytes - target.reserved_bytes
        layout = lay_out(
            config,
            _served(target.sizes, config, ladder),
            ladder,
            target.max_position,
            DeviceMemory(usable, lambda: usable, f"{target.device} can give"),
        )
        self.clock = SimulatedClock()
        self._slo, self._limits = config.slo, config.scheduler
        parts, self._device, self.scheduler = _parts(config, target, layout, self.clock)
        super().__init__(config, parts, self.clock)
        self._device.slowdown = slowdown
        self._monitor.expect(slowdown)

    @property
    def rung(self) -> int:
        """Steps of the ladder that are taken, or under way."""
        return self._rung if self._parts.swapper.in_flight else self._computing_rung

    @property
    def num_swaps(self) -> int:
        return self._monitor.swaps

    def state(self) -> State:
        """What a run is judged by, at this moment."""
        parts, scheduler, monitor = self._parts, self.scheduler, self._monitor
        return State(
            time=self.clock.seconds,
            layers=list(parts.layers.variants),
            swapping={swap.layer: swap.to for swap in parts.swapper.in_flight},
            ladder=list(parts.ladder.steps),
            blocks_used=parts.pool.num_used,
            blocks_capacity=parts.pool.capacity,
            blocks_full=parts.hello.capacities[0],
            block_tokens=parts.hello.block_tokens,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(scheduler.held),
            preemptions=scheduler.num_preemptions,
            swaps=monitor.swaps,
            generated_tokens=dict(monitor.generated_tokens),
        )

    def turn(self) -> Step | CountedBatch | None:
        """One step, or the time until the next look where there is nothing to do."""
        before_s = self.clock.seconds
        step = self._count_step() or self._whole_step()
        if self.clock.seconds == before_s:
            self._device.idle()
        return step

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing changes until a request comes."""
        if self.has_work or not self._has_arrived:
            return False
        return self._control.target == 0 or self._policy.static_layers >= 0

    def stretch(self) -> Stretch | None:
        """The quiet steps that lie ahead, if there are any worth skipping."""
        scheduler = self.scheduler
        if not self._may_count():
            return None
        scheduler.start_counting()
        steps = scheduler.quiet_steps()
        if steps < 2:
            return None
        found = Stretch(
            steps, self.clock.seconds, *self._device.decode_seconds(*scheduler.decoding)
        )
        if self._is_calm(steps):
            return found
        steps = found.begun_before(self._control.due_s())
        return replace(found, steps=steps) if steps > 1 else None

    def skip(self, stretch: Stretch, steps: int) -> None:
        """Does the first so many steps of a stretch."""
        last_s = stretch.end_s(steps - 1)
        if self._control.is_due(last_s):
            self._control.rest(last_s)
        self._device.skip(last_s, stretch.end_s(steps))
        self.scheduler.skip(steps)
        self._note(steps, steps * self.scheduler.decoding[0])

    def _count_step(self) -> CountedBatch | None:
        """A step on counts; None where the parts have to be shown each request."""
        if not self._may_count():
            return None
        scheduler, started_s = self.scheduler, self.clock.seconds
        scheduler.start_counting()
        if self._control.is_due(started_s):
            self._control.rest(started_s)
        self._limit_admission()
        batch = scheduler.count_step(started_s)
        if batch is None or not batch.decodes and not batch.prefills:
            return None
        self._monitor.scheduled(scheduler, started_s)
        self._device.run_counted(batch)
        self._note(1, batch.sampled)
        return batch

    def _whole_step(self) -> Step | None:
        self.scheduler.settle()
        return self.step()

    def _note(self, steps: int, generated: int) -> None:
        self._monitor.skipped(steps, generated, self._precision, self.clock.seconds)

    def _may_count(self) -> bool:
        """Whether the next step can neither lead to a decision nor meet a swap."""
        if not self._has_arrived or not self.scheduler.running and not self.scheduler.waiting:
            return False
        if self._limits.queue_timeout_s is not None and self.scheduler.waiting:
            return False
        return not self._control.is_due(self.clock.seconds) or self._is_calm(0)

    def _is_calm(self, steps: int) -> bool:
        """Whether a look after so many quiet steps, or before, cannot lead to anything."""
        if self._policy.static_layers >= 0:
            return True
        scheduler, hello = self.scheduler, self._parts.hello
        waiting = scheduler.waiting
        if self._control.target or scheduler.memory_blocked or len(waiting) > _FEW:
            return False
        horizon, size = steps + self._policy.horizon_tokens, hello.block_tokens
        most = scheduler.num_used + len(scheduler.running) * (2 + horizon // size)
        most += sum(2 + (request.num_tokens + horizon) // size for request in waiting)
        fits = most <= self._policy.demote_above * hello.capacities[0]
        return fits and (not waiting or self._is_soon(steps))

    def _is_soon(self, steps: int) -> bool:
        """Whether every waiting request is predicted well within its target, at worst.

        Their age counts, so that nothing is said of looks after further steps.
        """
        target_s = self._slo.ttft_s
        if target_s is None:
            return True
        if steps:
            return False
        scheduler = self.scheduler
        scheduler.start_counting()
        _, context = scheduler.decoding
        budget = self._limits.max_num_batched_tokens
        chunks = -(-scheduler.queued_tokens // max(1, budget - len(scheduler.running)))
        slowdown = self._monitor.slowdown or 1.0
        chunk_s = self._device.longest_step_s(budget, len(scheduler.running), context) * slowdown
        age_s = self.clock.seconds - scheduler.waiting[0].arrival_s
        return age_s + chunks * chunk_s <= self._policy.slo_share * target_s

    def _knows_tokens(self, message: Submit) -> bool:
        return True  # a simulated prompt has a length and no content


def ladder_of(config: EngineConfig, target: Target) -> Ladder:
    """The target's own; policies that never swap know INT4 only, as on a real device."""
    num_layers = target.sizes.num_layers
    order = list(range(num_layers))
    if target.ladder is not None:
        order = [step.layer for step in target.ladder if step.to is Variant.INT4]
    if config.policy.static_layers >= 0:
        return Ladder(steps_of(order, [Variant.INT4]), num_layers)
    if target.ladder is not None:
        return Ladder(target.ladder, num_layers)
    return Ladder(steps_of(order, target.sizes.quantized), num_layers)


def _served(sizes: ModelSizes, config: EngineConfig, ladder: Ladder) -> ModelSizes:
    """Of the images that this policy may use."""
    swaps = config.policy.max_demoted(ladder.num_layers) > 0
    used = {Variant.FULL, *(step.to for step in ladder.steps if swaps)}
    images = {variant: of for variant, of in sizes.image_bytes.items() if variant in used}
    return replace(sizes, image_bytes=images)


def _parts(
    config: EngineConfig, target: Target, layout: Layout, clock: SimulatedClock
) -> tuple[Parts, SimulatedDevice, CountedScheduler]:
    plan = layout.plan
    pool = CountingPool(plan.base_blocks)
    for layer, slab in enumerate(plan.slabs):
        for part in slab.freed_between(Variant.FULL, layout.variants[layer]):
            pool.publish((layer, part), slab.blocks[part])
    layers = SimulatedLayers(plan, layout.variants)
    device = SimulatedDevice(target, plan, layers, clock)
    scheduler = CountedScheduler(
        config.scheduler,
        pool,
        config.cache.block_tokens,
        layout.max_model_len,
    )
    link = PieceLink(device.copy, device.allowance)
    swapper = Swapper(device, plan, layers, pool, scheduler.move_blocks, link)
    parts = Parts(
        vocab_size=0,
        max_model_len=layout.max_model_len,
        ladder=layout.ladder,
        hello=layout.hello(target.device, "simulated", 0, "bfloat16"),
        pool=pool,
        scheduler=scheduler,
        layers=layers,
        swapper=swapper,
        runner=device,
        cost_model=target.costs,
    )
    return parts, device, scheduler
