"""Which layers are computed by the same compiled kernels."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields, is_dataclass

from torch import Tensor

from morphserve.runtime.kernels import LayerWeights


def one_of_each(
    views: Sequence[Sequence[LayerWeights]], but: Iterable[LayerWeights]
) -> list[LayerWeights]:
    """Weights of every kind that there is, once each, without the kinds of some."""
    left_out = {kind(weights) for weights in but}
    found = {kind(weights): weights for variants in views for weights in variants}
    return [weights for of_kind, weights in found.items() if of_kind not in left_out]


def kind(weights: object) -> Hashable:
    """All of weights but their numbers: kernels are compiled for that."""
    if isinstance(weights, Tensor):
        return weights.dtype, weights.shape, weights.stride()
    if is_dataclass(weights):
        return tuple(kind(getattr(weights, field.name)) for field in fields(weights))
    return weights
