"""Sampling in plain torch: what serves without a compiler, and what checks the C sampler."""

import torch
from torch import Tensor

from morphserve.runtime.kernels import Draw

NUCLEUS = 1024  # most likely tokens that nearly always hold the nucleus


def draw_token(logits: Tensor, draw: Draw) -> int:
    """Inverse-CDF sampling over the kept tokens, by id."""
    cumulative = kept(logits, draw).cumsum(dim=0, dtype=torch.float64)
    place = torch.searchsorted(cumulative, draw.uniform * cumulative[-1], right=True)
    last = torch.searchsorted(cumulative, cumulative[-1])  # where the product was rounded up
    return int(torch.minimum(place, last))


def kept(logits: Tensor, draw: Draw) -> Tensor:
    """Likelihood of each token [vocab] relative to the likeliest one's; 0: not kept."""
    weights = ((logits - logits.max()) / draw.temperature).exp()
    weights = weights.where(weights >= draw.min_p, 0.0)
    if 0 < draw.top_k < len(logits):
        weights = weights.where(_are_likeliest(logits, draw.top_k), 0.0)
    if draw.top_p < 1:
        weights = weights.where(_are_likeliest(logits, _nucleus_size(weights, draw.top_p)), 0.0)
    return weights


def _are_likeliest(logits: Tensor, count: int) -> Tensor:
    """Whether each token is one of so many, of equal ones the lower id first."""
    border = logits.topk(count).values[-1]
    chosen = logits > border
    chosen[(logits == border).nonzero()[: count - int(chosen.sum())]] = True
    return chosen


def _nucleus_size(weights: Tensor, top_p: float) -> int:
    """The fewest tokens, from the likeliest, whose mass reaches the share."""
    target, vocab = top_p * weights.sum(dtype=torch.float64), len(weights)
    size = vocab
    for width in (min(NUCLEUS, vocab), vocab):  # sorting a few is far cheaper than sorting all
        mass = weights.topk(width).values.cumsum(dim=0, dtype=torch.float64)
        size = int((mass < target).sum()) + 1
        if size <= width:
            break
    return min(size, vocab)
