"""What one layer costs by itself, and orders and ladders that add such costs up.

Costs of layers are nearly additive (see `independence`), so one run per layer and variant tells
almost what a greedy search over sets of layers would.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from morphserve.profile.mixes import Mix, Model, mix_of
from morphserve.profile.perplexity import measure
from morphserve.quantize.manifest import Rung, Variant


@dataclass(frozen=True, slots=True)
class Single:
    """One layer as one variant, all others at full precision."""

    divergence: float  # KL from full precision, nats per token
    freed_bytes: int

    @property
    def per_byte(self) -> float:
        return self.divergence / self.freed_bytes


Singles = Mapping[Variant, Sequence[Single]]  # of each layer


def replace_singly(
    model: Model, windows: Tensor, on_step: Callable[[], None] = lambda: None
) -> Singles:
    """Each layer as each variant of the bundle; takes a run per layer and variant."""
    mixes = {
        (variant, i): mix_of([i], model.num_layers, variant)
        for variant in model.variants
        for i in range(model.num_layers)
    }
    quality = measure(model, windows, mixes.values(), on_step)
    return {
        variant: [
            Single(quality[mixes[variant, i]].divergence, model.freed_bytes(i, variant))
            for i in range(model.num_layers)
        ]
        for variant in model.variants
    }


def order_by_cost(singles: Sequence[Single]) -> list[int]:
    """Layers by the increase of KL per byte that INT4 frees, the least first."""
    return sorted(range(len(singles)), key=lambda i: singles[i].per_byte)


def climb(singles: Singles) -> list[Rung]:
    """Steps to INT8 and on to INT4 until every layer is INT4, the cheapest possible one next.

    A step's price is its increase of KL per byte that it frees, as single replacements tell it.
    """
    next_steps = {i: Rung(i, Variant.INT8) for i in range(len(singles[Variant.INT8]))}
    rungs: list[Rung] = []
    while next_steps:
        rung = min(next_steps.values(), key=lambda step: (_price(singles, step), step))
        rungs.append(rung)
        if rung.to is Variant.INT8:
            next_steps[rung.layer] = Rung(rung.layer, Variant.INT4)
        else:
            del next_steps[rung.layer]
    return rungs


def mixes_along(rungs: Sequence[Rung], num_layers: int) -> list[Mix]:
    """The mix after each rung, from all layers at full precision."""
    now = list(mix_of((), num_layers))
    mixes = []
    for rung in rungs:
        now[rung.layer] = rung.to
        mixes.append(tuple(now))
    return mixes


def _price(singles: Singles, step: Rung) -> float:
    int8, int4 = singles[Variant.INT8][step.layer], singles[Variant.INT4][step.layer]
    if step.to is Variant.INT8:
        return int8.per_byte
    return (int4.divergence - int8.divergence) / (int4.freed_bytes - int8.freed_bytes)
