"""Whether a layer costs the same whatever else is replaced: the paper's Table 2, and sums."""

from collections.abc import Sequence

import msgspec

from morphserve.profile.mixes import Mix, Model, mix_of
from morphserve.profile.ranking import OnProgress, measured, replacement_counts
from morphserve.quantize.calibration import Windows
from morphserve.quantize.manifest import TextSample

_NUM_PROBES = 3


class Probe(msgspec.Struct, frozen=True):
    """What one more layer at INT4 adds after each number of replacements."""

    layer: int
    perplexity: list[float]
    divergence: list[float]  # KL from full precision, nats per token


class Independence(msgspec.Struct, frozen=True):
    """Effects of layers together and alone; divergences are KL in nats per token."""

    text: TextSample
    order: list[int]
    probed: list[int]  # numbers of replacements, the first of the order, that probes are added to
    probes: list[Probe]
    replaced: list[int]  # numbers of replacements of the lists below
    joint: list[float]  # divergence of the first of the order, replaced together
    summed: list[float]  # the sum of their divergences, each replaced alone


def study_independence(
    model: Model,
    order: Sequence[int],
    windows: Windows,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> Independence:
    """Adds a few layers of the end of `order` to its first 0, 1, 2, 4, 8, ... layers."""
    counts = replacement_counts(model.num_layers)
    probed, replaced = counts[:-1], counts[1:]
    probes = _spread(order[probed[-1] :], _NUM_PROBES)

    def mix(*layers: int) -> Mix:
        return mix_of(layers, model.num_layers)

    together = {number: mix(*order[:number]) for number in counts}
    alone = {layer: mix(layer) for layer in order}
    added = {(layer, n): mix(*order[:n], layer) for layer in probes for n in probed}
    mixes = {*together.values(), *alone.values(), *added.values()}
    quality = measured(model, windows, mixes, "adding single layers", on_progress)

    def extra(layer: int) -> Probe:
        pairs = [(quality[added[layer, n]], quality[together[n]]) for n in probed]
        return Probe(
            layer=layer,
            perplexity=[more.perplexity - less.perplexity for more, less in pairs],
            divergence=[more.divergence - less.divergence for more, less in pairs],
        )

    return Independence(
        text=windows.sample,
        order=list(order),
        probed=probed,
        probes=[extra(layer) for layer in probes],
        replaced=replaced,
        joint=[quality[together[n]].divergence for n in replaced],
        summed=[sum(quality[alone[i]].divergence for i in order[:n]) for n in replaced],
    )


def _spread(layers: Sequence[int], number: int) -> list[int]:
    """At most so many of the layers: the first, the last and some between."""
    last = len(layers) - 1
    return [layers[i] for i in sorted({round(last * j / (number - 1)) for j in range(number)})]
