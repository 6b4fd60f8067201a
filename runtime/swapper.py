"""Carries swaps through: copies bytes before or beside each step, commits between two steps.

A layer goes from any variant to any other. Demote: the smaller image goes to staging in pieces; at
a boundary it moves to the slab's tail, the layer is switched, and what it frees joins the block
pool. Promote: the live blocks where the larger image will lie move elsewhere, its front part is
written in place in pieces while the smaller image serves from the tail, the rest goes to staging;
at a boundary that moves to the tail and the layer is switched. A swap that fails before or in its
commit leaves weights, blocks and capacity as they were.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from morphserve.quantize.manifest import Variant
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.device.link import Bytes, Link, Transfer
from morphserve.runtime.ladder import DEPTH
from morphserve.runtime.memory import MemoryPlan

logger = logging.getLogger(__name__)


class Memory(Protocol):
    """The arena."""

    def span(self, offset: int, num_bytes: int) -> Bytes: ...

    def copy_blocks(self, moves: Mapping[int, int]) -> None: ...


class Image(Protocol):
    @property
    def host(self) -> Bytes: ...


class Layers(Protocol):
    """Host images of every layer, and the active variant of each."""

    variants: list[Variant]

    @property
    def images(self) -> Mapping[Variant, Sequence[Image]]: ...

    def activate(self, layer: int, variant: Variant) -> None: ...


@dataclass(slots=True)
class Swap:
    """One layer on its way to another variant."""

    layer: int
    was: Variant
    to: Variant
    slot: int = -1  # byte offset of its staging slot
    transfer: Transfer = field(default_factory=lambda: Transfer([]))  # of what a commit needs

    @property
    def is_demotion(self) -> bool:
        return DEPTH[self.to] > DEPTH[self.was]


class Swapper:
    """Several layers may be in flight, one per staging slot. Decides nothing."""

    def __init__(
        self,
        arena: Memory,
        plan: MemoryPlan,
        layers: Layers,
        pool: BlockPool,
        relocate: Callable[[Mapping[int, int]], None],
        link: Link,
    ) -> None:
        self._arena, self._plan, self._layers, self._pool = arena, plan, layers, pool
        self._relocate = relocate  # rewrites the block tables: old block -> new block
        self._link = link
        self._slots = list(plan.staging)
        self.in_flight: list[Swap] = []
        self.failures: list[str] = []  # what went wrong, for the caller to report and clear

    @property
    def has_room(self) -> bool:
        return bool(self._slots)

    def start(self, layer: int, to: Variant) -> bool:
        """Begins a swap; False if its live blocks find no room elsewhere. Between steps only."""
        assert self.has_room and self._layers.variants[layer] is not to
        swap = Swap(layer, self._layers.variants[layer], to)
        if not swap.is_demotion and not self._evacuate(swap):
            return False
        swap.slot = self._slots.pop()
        swap.transfer = self._link.begin(self._copies(swap))
        self.in_flight.append(swap)
        return True

    def advance(self) -> None:
        """Copies the next pieces. The running step reads none of the bytes that are written."""
        allowance = self._link.allowance()
        for swap in list(self.in_flight):
            try:
                allowance = self._link.carry(swap.transfer, allowance)
            except Exception:
                self._roll_back(swap)

    def commit_ready(self) -> list[Swap]:
        """Switches the layers whose copies are complete, and returns them. Between steps only."""
        done = []
        for swap in [s for s in self.in_flight if self._link.has_arrived(s.transfer)]:
            try:
                self._commit(swap)
            except Exception:
                self._roll_back(swap, restore=True)
            else:
                done.append(swap)
        return done

    def _evacuate(self, swap: Swap) -> bool:
        """Empties the parts of the slab that the larger image needs, the deepest first."""
        moves: dict[int, int] = {}
        taken: list[Variant] = []
        for part in reversed(self._parts(swap)):
            more = self._pool.evacuate((swap.layer, part))
            if more is None:
                break
            # A block that had gone to the part that is emptied now moves once, to its last home.
            moves = {old: more.pop(new, new) for old, new in moves.items()} | more
            taken.insert(0, part)
        self._arena.copy_blocks(moves)
        self._relocate(moves)
        if taken == self._parts(swap):
            return True
        self._publish(swap.layer, taken)
        return False

    def _parts(self, swap: Swap) -> list[Variant]:
        """Whose blocks of the slab the swap frees or takes back, the shallowest first."""
        upper, lower = sorted((swap.was, swap.to), key=DEPTH.__getitem__)
        return self._plan.slabs[swap.layer].freed_between(upper, lower)

    def _publish(self, layer: int, parts: Sequence[Variant]) -> None:
        """The shallowest first: the pool fills it first, and the part wanted back first last."""
        for part in parts:
            self._pool.publish((layer, part), self._plan.slabs[layer].blocks[part])

    def _copies(self, swap: Swap) -> list[tuple[Bytes, Bytes]]:
        """What must be in place before the commit."""
        front, rest = self._split(swap, swap.to)
        offset = self._plan.slabs[swap.layer].offsets[swap.to]
        return [
            (self._arena.span(start, part.numel()), part)
            for start, part in ((offset, front), (swap.slot, rest))
            if part.numel()
        ]

    def _split(self, swap: Swap, variant: Variant) -> tuple[Bytes, Bytes]:
        """An image of the layer: what lies before the smaller one, and what shares its bytes."""
        offsets = self._plan.slabs[swap.layer].offsets
        host = self._layers.images[variant][swap.layer].host
        front = max(offsets[swap.was], offsets[swap.to]) - offsets[variant]
        return host[:front], host[front:]

    def _commit(self, swap: Swap) -> None:
        tail = self._tail(swap, swap.to)
        self._link.land(swap.transfer, tail, self._arena.span(swap.slot, tail.numel()))
        if swap.is_demotion:
            self._publish(swap.layer, self._parts(swap))
        self._layers.activate(swap.layer, swap.to)
        self._retire(swap)

    def _tail(self, swap: Swap, variant: Variant) -> Bytes:
        """The bytes of the arena that images of both variants use, as far as this one does."""
        offsets = self._plan.slabs[swap.layer].offsets
        start = max(offsets[swap.was], offsets[swap.to])
        return self._arena.span(start, self._split(swap, variant)[1].numel())

    def _roll_back(self, swap: Swap, *, restore: bool = False) -> None:
        """Gives up a swap: the layer keeps its variant, its blocks come back.

        With `restore`, a commit may have written part of the tail. What fails here, too, is not
        the swap but the device, and goes up.
        """
        logger.exception("swap of layer %d to %s failed", swap.layer, swap.to.value)
        self.failures.append(f"layer {swap.layer} to {swap.to.value} failed, rolled back")
        self._link.abandon(swap.transfer)
        if restore:
            self._link.restore(self._tail(swap, swap.was), self._split(swap, swap.was)[1])
        if not swap.is_demotion:
            self._publish(swap.layer, self._parts(swap))
        self._retire(swap)

    def _retire(self, swap: Swap) -> None:
        self.in_flight.remove(swap)
        self._slots.append(swap.slot)
