"""The ladder: which layer takes which variant at each rung, as plain arithmetic.

Rung r means that the first r steps of the ladder have been taken. A layer may take several steps,
to INT8 first and on to INT4.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from morphserve.quantize.manifest import Rung, Variant

DEPTH = {Variant.FULL: 0, Variant.INT8: 1, Variant.INT4: 2}  # how far each is from full precision


def lowest(variants: Collection[Variant]) -> Variant:
    """The lowest precision among them."""
    return max(variants, key=DEPTH.__getitem__)


def steps_of(order: Sequence[int], variants: Sequence[Variant]) -> tuple[Rung, ...]:
    """Every layer of the order to the first of the variants, then every one to the next."""
    return tuple(Rung(layer, variant) for variant in variants for layer in order)


@dataclass(frozen=True, slots=True)
class Ladder:
    """Steps of demotion. A layer's own steps go down only."""

    steps: tuple[Rung, ...]  # the first taken first
    num_layers: int

    def variants_at(self, rung: int) -> list[Variant]:
        """Of every layer, with the first `rung` steps taken."""
        variants = [Variant.FULL] * self.num_layers
        for step in self.steps[:rung]:
            variants[step.layer] = step.to
        return variants

    def rung_of(self, variants: Sequence[Variant]) -> int:
        """The shallowest rung at which no layer is at a higher precision than in `variants`.

        Layers that are between two rungs, while swaps are under way, count as the deeper one.
        """
        taken = (
            i + 1
            for i, step in enumerate(self.steps)
            if DEPTH[variants[step.layer]] >= DEPTH[step.to]
        )
        return max(taken, default=0)

    def deepest_with(self, num_int4: int) -> int:
        """The deepest rung at which at most so many layers are INT4."""
        rungs = range(len(self.steps), -1, -1)
        return next(r for r in rungs if self.variants_at(r).count(Variant.INT4) <= num_int4)

    def deepest(self, lowest_precision: Variant) -> int:
        """The deepest rung whose layers all have at least this precision."""
        allowed = DEPTH[lowest_precision]
        first = (i for i, step in enumerate(self.steps) if DEPTH[step.to] > allowed)
        return next(first, len(self.steps))

    def next_swap(
        self, variants: Sequence[Variant], moving: Collection[int], target: int
    ) -> Rung | None:
        """What leads on to rung `target`: demotion along the ladder, promotion back along it.

        `variants` are those that layers have or are on their way to; layers in `moving` wait. On
        the way down a layer goes straight to the variant that it has at `target`. On the way back
        each step is undone by itself, the deepest first: that takes the fewest blocks, and requests
        with a floor of precision run again as soon as can be.
        """
        wanted = self.variants_at(target)
        for step in self.steps:
            layer = step.layer
            if layer not in moving and DEPTH[wanted[layer]] > DEPTH[variants[layer]]:
                return Rung(layer, wanted[layer])
        for rung in range(len(self.steps) - 1, target - 1, -1):
            step = self.steps[rung]
            if step.layer not in moving and DEPTH[variants[step.layer]] >= DEPTH[step.to]:
                return Rung(step.layer, self.variants_at(rung)[step.layer])
        return None
