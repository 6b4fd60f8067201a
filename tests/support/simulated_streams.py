"""Two streams whose work is done when an adversary says so, and an engine's memory behind them.

He may do the next piece of work of either stream, as early or as late as he likes, as long as the
stream's order and the events that were waited for allow it. Copies are done in two halves, so that
one may be met half-way. Whatever waits are to be tried without can be left out.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from morphserve.quantize.manifest import Variant
from morphserve.runtime.arena import Arena
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.device.host import HostDevice
from morphserve.runtime.device.streams import StreamLink
from morphserve.runtime.memory import ModelSizes, budget_for, plan_memory
from morphserve.runtime.swapper import Swapper

SIZES = ModelSizes(
    static_bytes=0,
    image_bytes={Variant.FULL: (2048,) * 3, Variant.INT8: (1100,) * 3, Variant.INT4: (600,) * 3},
    kv_bytes_per_token=16,
    block_tokens=4,
)
VARIANTS = tuple(SIZES.image_bytes)


class SimulatedEvent:
    def __init__(self, lies: bool) -> None:
        self.passed, self._lies = False, lies

    def query(self) -> bool:
        return self.passed or self._lies


@dataclass
class SimulatedStream:
    waits: bool  # False: it goes on without
    lies: bool  # whether its events say that they have passed before they have
    fails_at: int = 0  # the copy, counted from 1, that raises after it has done harm; 0: none
    work: deque[Callable[[], object] | SimulatedEvent] = field(default_factory=deque)

    def copy(self, destination: Tensor, source: Tensor) -> None:
        self.fails_at -= 1
        half = len(destination) // 2
        if self.fails_at == 0:
            self.work.append(lambda: destination[:half].fill_(255))
            raise RuntimeError("injected")
        self.work.append(lambda: destination[:half].copy_(source[:half]))
        self.work.append(lambda: destination[half:].copy_(source[half:]))

    def pause(self) -> None:
        self.work.append(lambda: None)

    def record(self) -> SimulatedEvent:
        event = SimulatedEvent(self.lies)

        def passes() -> None:
            event.passed = True

        self.work.append(passes)
        return event

    def wait(self, event: SimulatedEvent) -> None:
        if self.waits:
            self.work.append(event)

    def can_go_on(self) -> bool:
        if not self.work:
            return False
        head = self.work[0]
        return not isinstance(head, SimulatedEvent) or head.passed

    def go_on(self) -> None:
        head = self.work.popleft()
        if not isinstance(head, SimulatedEvent):
            head()


@dataclass
class _Image:
    host: Tensor


@dataclass
class _Layers:
    images: Mapping[Variant, Sequence[_Image]]
    variants: list[Variant]

    def activate(self, layer: int, variant: Variant) -> None:
        self.variants[layer] = variant


class SimulatedMemory:
    """The arena; it moves blocks on the compute stream."""

    def __init__(self, arena: Arena, compute: SimulatedStream) -> None:
        self._arena, self._compute = arena, compute
        self.span = arena.span

    def copy_blocks(self, moves: Mapping[int, int]) -> None:
        self._compute.work.append(lambda: self._arena.copy_blocks(moves))


class Engine:
    """Steps that read every layer and every block in use, and note what they find wrong.

    without: of "side waits", "compute waits", "queries", what is left out.
    """

    def __init__(
        self, random: Random, without: Collection[str] = (), *, is_pinned: bool = True
    ) -> None:
        self._random = random
        self.side = SimulatedStream("side waits" not in without, "queries" in without)
        self.compute = SimulatedStream("compute waits" not in without, "queries" in without)
        self.plan = plan_memory(SIZES, budget_for(SIZES, 2, 1, 48), 2, 1)
        self.arena = Arena(self.plan, HostDevice())
        self.layers = _Layers(_random_images(random), [Variant.FULL] * SIZES.num_layers)
        for slab, image in zip(self.plan.slabs, self.layers.images[Variant.FULL], strict=True):
            self.arena.span(slab.offsets[Variant.FULL], len(image.host)).copy_(image.host)
        self.pool = BlockPool(self.plan.base_blocks)
        link = StreamLink(self.compute, self.side, is_pinned=is_pinned)
        memory = SimulatedMemory(self.arena, self.compute)
        self.swapper = Swapper(memory, self.plan, self.layers, self.pool, self._relocate, link)
        self.held: dict[int, int] = {}  # block in use -> what it holds
        self._new: list[int] = []  # of these, those that no step has written
        self._value = 0
        self.moved = 0
        self.swapped = 0
        self.wrong: list[str] = []

    def turn(self, swap: tuple[int, Variant] | None) -> None:
        """One step of the engine, and then as much of the streams' work as the adversary likes."""
        self.swapped += len(self.swapper.commit_ready())
        if swap is not None and self.swapper.has_room:
            layer, to = swap
            is_free = all(s.layer != layer for s in self.swapper.in_flight)
            if is_free and self.layers.variants[layer] is not to:
                self.swapper.start(layer, to)
        self._change_requests()
        self.swapper.advance()
        self._launch()
        self.compute_some(self._random.choice((0, 3, 10, 40)))

    def compute_some(self, count: int) -> None:
        for _ in range(count):
            ready = [s for s in (self.side, self.compute) if s.can_go_on()]
            if not ready:
                return
            self._random.choice(ready).go_on()

    def finish(self) -> None:
        """All work that is left; what still flies is brought home."""
        while self.swapper.in_flight or self.compute.work or self.side.work:
            self.compute_some(10**6)
            assert not self.compute.work and not self.side.work, "the streams wait for each other"
            self.swapped += len(self.swapper.commit_ready())
            self.swapper.advance()
        self._launch()
        self.compute_some(10**6)

    def _change_requests(self) -> None:
        for block in self._random.sample(sorted(self.held), len(self.held) // 4):
            self.pool.free([block])
            del self.held[block]
            self._new = [new for new in self._new if new != block]
        blocks = self.pool.allocate(self._random.randint(0, self.pool.num_free))
        self._new += blocks
        self.held.update(dict.fromkeys(blocks, 0))

    def _relocate(self, moves: Mapping[int, int]) -> None:
        self.moved += len(moves)
        self.held = {moves.get(block, block): value for block, value in self.held.items()}
        self._new = [moves.get(block, block) for block in self._new]

    def _launch(self) -> None:
        """A step that reads each layer's weights and KV, and then writes some of the KV anew."""
        read = {block: value for block, value in self.held.items() if block not in self._new}
        again = self._random.sample(sorted(read), len(read) // 3)
        written = {}
        for block in (*self._new, *again):
            self._value += 1
            written[block] = self._value
        for layer, variant in enumerate(self.layers.variants):
            self._launch_layer(layer, variant, read, written)
        self.held |= written
        self._new = []

    def _launch_layer(
        self, layer: int, variant: Variant, read: Mapping[int, int], written: Mapping[int, int]
    ) -> None:
        host = self.layers.images[variant][layer].host
        weights = self.arena.span(self.plan.slabs[layer].offsets[variant], len(host))
        cache = self.arena.cache(layer, torch.uint8)

        def compute() -> None:
            if not torch.equal(weights, host):
                self.wrong.append(f"weights of layer {layer} as {variant}")
            for block, value in read.items():
                if not bool((cache[block] == _content(value, layer)).all()):
                    self.wrong.append(f"KV of block {block}, layer {layer}")
            for block, value in written.items():
                cache[block] = _content(value, layer)

        self.compute.work.append(compute)


def _content(value: int, layer: int) -> int:
    return (value * SIZES.num_layers + layer) % 251


def _random_images(random: Random) -> dict[Variant, list[_Image]]:
    return {
        variant: [
            _Image(torch.frombuffer(bytearray(random.randbytes(n)), dtype=torch.uint8))
            for n in sizes
        ]
        for variant, sizes in SIZES.image_bytes.items()
    }
