"""Orders of demotion, and what each costs after some number of replacements."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import count, takewhile

from morphserve.profile.mixes import Model, num_batches
from morphserve.profile.perplexity import Mix, Quality, measure
from morphserve.profile.sensitivity import rank_layers
from morphserve.quantize.bundle import Bundle
from morphserve.quantize.calibration import Windows
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.manifest import RankedOrder, Ranking

LIS = "lis"


def replacement_counts(num_layers: int) -> list[int]:
    """0, 1, 2, 4, 8, ... and all layers: the numbers of replacements at which orders compare."""
    powers = takewhile(lambda power: power < num_layers, (2**i for i in count()))
    return [0, *powers, num_layers]


def fixed_orders(num_layers: int, seed: int) -> dict[str, list[int]]:
    """The orders that need no measurement."""
    front_to_back = list(range(num_layers))
    return {
        "front-to-back": front_to_back,
        "back-to-front": front_to_back[::-1],
        f"random-{seed}": random.Random(seed).sample(front_to_back, num_layers),
    }


def rank(
    checkpoint: Checkpoint,
    bundle: Bundle,
    calibration: Windows,
    selection: Windows,
    seed: int,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Ranking:
    """Ranks layers by LIS on one text and compares orders on another.

    The order with the lowest mean KL divergence from full precision, between no and all
    replacements, is chosen. Perplexity is recorded but does not choose: on a text of practical
    size one layer moves it by less than chance does, and rounding may even seem to improve it.
    `on_progress` is told the phase, the steps done in it and their total.
    """
    model = Model(checkpoint, bundle)
    candidates = model.num_layers * (model.num_layers + 1) // 2
    step = _steps("ranking layers", candidates * num_batches(calibration.tokens), on_progress)
    ranked = rank_layers(model, calibration.tokens, step)
    orders = {LIS: [entry.layer for entry in ranked]} | fixed_orders(model.num_layers, seed)
    counts = replacement_counts(model.num_layers)
    mixes = {frozenset(order[:number]) for order in orders.values() for number in counts}
    step = _steps("comparing orders", len(mixes) * num_batches(selection.tokens), on_progress)
    quality = measure(model, selection.tokens, mixes, step)
    scores = {LIS: [entry.score for entry in ranked]}
    described = [
        _describe(name, order, scores.get(name, []), counts, quality)
        for name, order in orders.items()
    ]
    return Ranking(
        calibration=calibration.sample,
        selection=selection.sample,
        replaced=counts,
        orders=described,
        chosen=min(described, key=mean_divergence).name,
    )


def _steps(
    phase: str, total: int, on_progress: Callable[[str, int, int], None]
) -> Callable[[], None]:
    """A function that reports one more step each time it is called."""
    done = count(1)
    return lambda: on_progress(phase, next(done), total)


def mean_divergence(order: RankedOrder) -> float:
    """Over the numbers of replacements at which orders can differ: not none, not all."""
    between = order.divergence[1:-1] or order.divergence
    return sum(between) / len(between)


def _describe(
    name: str,
    order: list[int],
    scores: list[float],
    counts: Sequence[int],
    quality: Mapping[Mix, Quality],
) -> RankedOrder:
    costs = [quality[frozenset(order[:number])] for number in counts]
    return RankedOrder(
        name=name,
        layers=order,
        scores=scores,
        perplexity=[cost.perplexity for cost in costs],
        divergence=[cost.divergence for cost in costs],
    )
