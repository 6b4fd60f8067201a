"""Carries swaps through: copies some bytes before each step, commits between two steps.

Demote: the INT4 image goes to staging in pieces; at a boundary it moves to the slab's tail, the
layer is switched, and the slab's front joins the block pool. Promote: the front's live blocks move
elsewhere, the full image's front part is written in place in pieces while INT4 serves from the
tail, its tail part goes to staging; at a boundary that moves to the tail and the layer is switched.
A swap that fails before or in its commit leaves weights, blocks and capacity as they were.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from morphserve.quantize.manifest import Variant
from morphserve.runtime.arena import Arena
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.ladder import DEPTH
from morphserve.runtime.layers import Layers
from morphserve.runtime.memory import MemoryPlan

logger = logging.getLogger(__name__)

BYTES_PER_STEP = 8 * 2**20  # copied before one step, all swaps in flight together
Copy = Callable[[Tensor, Tensor], None]  # (destination, source), uint8 of equal length


def copy_bytes(destination: Tensor, source: Tensor) -> None:
    """One memcpy: torch would wake a second thread, which takes longer than a layer's bytes."""
    np.copyto(destination.numpy(), source.numpy())


@dataclass(slots=True)
class Swap:
    """One layer on its way to another variant."""

    layer: int
    was: Variant
    to: Variant
    slot: int  # byte offset of its staging slot
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (destination, source)

    @property
    def is_demotion(self) -> bool:
        return DEPTH[self.to] > DEPTH[self.was]


class Swapper:
    """Several layers may be in flight, one per staging slot. Decides nothing."""

    def __init__(
        self,
        arena: Arena,
        plan: MemoryPlan,
        layers: Layers,
        pool: BlockPool,
        relocate: Callable[[Mapping[int, int]], None],
        copy: Copy = copy_bytes,
    ) -> None:
        self._arena, self._plan, self._layers, self._pool = arena, plan, layers, pool
        self._relocate = relocate  # rewrites the block tables: old block -> new block
        self._copy = copy
        self._slots = list(plan.staging)
        self.in_flight: list[Swap] = []
        self.failures: list[str] = []  # what went wrong, for the caller to report and clear

    @property
    def has_room(self) -> bool:
        return bool(self._slots)

    def start(self, layer: int, to: Variant) -> bool:
        """Begins a swap; False if its live blocks find no room elsewhere. Between steps only."""
        assert self.has_room and self._layers.variants[layer] is not to
        if to is Variant.FULL and not self._evacuate(layer):
            return False
        swap = Swap(layer, self._layers.variants[layer], to, self._slots.pop())
        swap.pending = self._copies(swap)
        self.in_flight.append(swap)
        return True

    def advance(self) -> None:
        """Copies the next pieces. The running step reads none of the bytes that are written."""
        allowance = BYTES_PER_STEP
        for swap in list(self.in_flight):
            try:
                allowance = self._copy_pieces(swap, allowance)
            except Exception:
                self._roll_back(swap)

    def commit_ready(self) -> list[Swap]:
        """Switches the layers whose copies are complete, and returns them. Between steps only."""
        done = []
        for swap in [swap for swap in self.in_flight if not swap.pending]:
            try:
                self._commit(swap)
            except Exception:
                self._restore_tail(swap)
                self._roll_back(swap)
            else:
                done.append(swap)
        return done

    def _evacuate(self, layer: int) -> bool:
        moves = self._pool.evacuate(layer)
        if moves is None:
            return False
        self._arena.copy_blocks(moves)
        self._relocate(moves)
        return True

    def _copies(self, swap: Swap) -> list[tuple[Tensor, Tensor]]:
        """What must be in place before the commit."""
        if swap.to is Variant.INT4:
            image = self._layers.int4[swap.layer].host
            return [(self._arena.span(swap.slot, image.numel()), image)]
        image = self._layers.full[swap.layer].host
        slab = self._plan.slabs[swap.layer]
        front = min(slab.int4_offset - slab.full_offset, image.numel())
        tail = image.numel() - front
        return [
            (self._arena.span(slab.full_offset, front), image[:front]),
            (self._arena.span(swap.slot, tail), image[front:]),
        ]

    def _copy_pieces(self, swap: Swap, allowance: int) -> int:
        while swap.pending and allowance > 0:
            destination, source = swap.pending.pop(0)
            count = min(source.numel(), allowance)
            self._copy(destination[:count], source[:count])
            if count < source.numel():
                swap.pending.insert(0, (destination[count:], source[count:]))
            allowance -= count
        return allowance

    def _commit(self, swap: Swap) -> None:
        destination, source = self._staged(swap)
        self._copy(destination, source)
        if swap.to is Variant.INT4:
            self._pool.publish(swap.layer, self._plan.slabs[swap.layer].blocks)
        self._layers.activate(swap.layer, swap.to)
        self._retire(swap)

    def _staged(self, swap: Swap) -> tuple[Tensor, Tensor]:
        """(the slab's tail, the staged bytes that belong there)"""
        slab = self._plan.slabs[swap.layer]
        if swap.to is Variant.INT4:
            count = self._layers.int4[swap.layer].num_bytes
        else:
            front = slab.int4_offset - slab.full_offset
            count = max(0, self._layers.full[swap.layer].num_bytes - front)
        return self._arena.span(slab.int4_offset, count), self._arena.span(swap.slot, count)

    def _restore_tail(self, swap: Swap) -> None:
        """Undoes a commit that may have written part of the tail."""
        slab = self._plan.slabs[swap.layer]
        if swap.to is Variant.INT4:
            image = self._layers.full[swap.layer].host
            image = image[slab.int4_offset - slab.full_offset :]
        else:
            image = self._layers.int4[swap.layer].host
        self._arena.span(slab.int4_offset, image.numel()).copy_(image)

    def _roll_back(self, swap: Swap) -> None:
        """Gives up a swap: the layer keeps its variant, its blocks come back."""
        logger.exception("swap of layer %d to %s failed", swap.layer, swap.to.value)
        self.failures.append(f"layer {swap.layer} to {swap.to.value} failed, rolled back")
        if swap.to is Variant.FULL:
            self._pool.publish(swap.layer, self._plan.slabs[swap.layer].blocks)
        self._retire(swap)

    def _retire(self, swap: Swap) -> None:
        self.in_flight.remove(swap)
        self._slots.append(swap.slot)
