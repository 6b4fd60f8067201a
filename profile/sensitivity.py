"""LIS, the order in which layers are best replaced by INT4, after Algorithm 1 of the paper.

For layer p and the set S replaced so far, with cosines per token averaged over all tokens:
LTS = cos(h_p(x), x), how little the layer transforms its input; LRS = cos(h_p(x), h_p^Q(x)), how
close its INT4 variant comes, both at full precision throughout; MDS = cos(f^S(x), f^(S+p)(x)), how
little the logits move. LIS = 0.25 LTS + 0.25 LRS + 0.5 MDS; the larger, the safer to replace.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.profile.mixes import Model, Run, batches

_LTS_SHARE, _LRS_SHARE, _MDS_SHARE = 0.25, 0.25, 0.5


@dataclass(frozen=True, slots=True)
class Ranked:
    layer: int
    score: float  # LIS at the moment it was chosen


def rank_layers(
    model: Model, windows: Tensor, on_step: Callable[[], None] = lambda: None
) -> list[Ranked]:
    """Greedy: the layer of highest LIS is replaced and stays so, until none is left.

    Takes L (L + 1) / 2 candidates; `on_step` is called after each. A candidate computes only its
    layer and the later ones: what enters it is known from the current mix.
    """
    ranked: list[Ranked] = []
    with torch.inference_mode():
        runs = [Run(model, batch) for batch in batches(windows)]
        own = _own_scores(model, runs)
        while len(ranked) < model.num_layers:
            taken = {entry.layer for entry in ranked}
            scores = {
                p: own[p] + _MDS_SHARE * mds
                for p, mds in _model_scores(model, runs, taken, on_step).items()
            }
            best = max(scores, key=lambda p: (scores[p], -p))
            ranked.append(Ranked(best, scores[best]))
            for run in runs:
                run.change(taken | {best})
    return ranked


def _own_scores(model: Model, runs: Sequence[Run]) -> list[float]:
    """0.25 LTS + 0.25 LRS of each layer, from runs at full precision."""
    scores = []
    for p in range(model.num_layers):
        transformed = [(run.entering(p + 1), run.entering(p)) for run in runs]
        replaced = [
            (run.entering(p + 1), model.layer(run.entering(p), p, int4=True)) for run in runs
        ]
        scores.append(_LTS_SHARE * _mean_cosine(transformed) + _LRS_SHARE * _mean_cosine(replaced))
    return scores


def _model_scores(
    model: Model, runs: Sequence[Run], taken: set[int], on_step: Callable[[], None]
) -> dict[int, float]:
    """MDS of each layer that is not taken yet."""
    candidates = [p for p in range(model.num_layers) if p not in taken]
    sums = dict.fromkeys(candidates, 0.0)
    for run in runs:
        current = run.logits()
        for p in candidates:
            sums[p] += _sum_cosines(current, run.logits_with(p))
            on_step()
    count = sum(run.tokens.numel() for run in runs)
    return {p: total / count for p, total in sums.items()}


def _mean_cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    count = sum(a[..., 0].numel() for a, _ in pairs)
    return sum(_sum_cosines(a, b) for a, b in pairs) / count


def _sum_cosines(a: Tensor, b: Tensor) -> float:
    """Sum over tokens of the cosine between two [..., features]."""
    return float(F.cosine_similarity(a, b, dim=-1).sum(dtype=torch.double))
