"""LIS, the order in which layers are best replaced by INT4, after Algorithm 1 of the paper.

For layer p and the set S replaced so far, with similarities per token averaged over all tokens:
LTS = sim(h_p(x), x), how little the layer transforms its input; LRS = sim(h_p(x), h_p^Q(x)), how
close its INT4 variant comes, both at full precision throughout; MDS = sim(f^S(x), f^(S+p)(x)), how
little the logits move. LIS is their sum with weights, the paper's 0.25, 0.25 and 0.5 if none are
given; the larger, the safer to replace. The paper's similarity is the cosine; `Distance` has both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from morphserve.profile.mixes import Model, Run, batches, mix_of
from morphserve.quantize.manifest import Distance, LisSettings, Variant

_TINY = 1e-30  # so that zero vectors have no similarity of NaN


@dataclass(frozen=True, slots=True)
class Ranked:
    layer: int
    score: float  # LIS at the moment it was chosen


@dataclass(frozen=True, slots=True)
class Lis:
    order: list[Ranked]
    lts: list[float]  # of each layer, as the rest
    lrs: list[float]
    mds: list[float]  # with no other layer replaced


def rank_layers(
    model: Model,
    windows: Tensor,
    settings: LisSettings | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Lis:
    """Greedy: the layer of highest LIS is replaced and stays so, until none is left.

    Takes L (L + 1) / 2 candidates; `on_step` is called after each of each batch. A candidate
    computes only its layer and the later ones: what enters it is known from the current mix.
    """
    settings = settings or LisSettings()
    a1, a2, b = settings.weights
    with torch.inference_mode():
        runs = [Run(model, batch) for batch in batches(windows)]
        lts, lrs = _own_scores(model, runs, settings.distance)
        order: list[Ranked] = []
        alone: dict[int, float] = {}
        while len(order) < model.num_layers:
            taken = [entry.layer for entry in order]
            for run in runs:
                run.change(mix_of(taken, model.num_layers))
            mds = _model_scores(model, runs, taken, settings.distance, on_step)
            alone = alone or mds
            scores = {p: a1 * lts[p] + a2 * lrs[p] + b * mds[p] for p in mds}
            best = max(scores, key=lambda p: (scores[p], -p))
            order.append(Ranked(best, scores[best]))
    return Lis(order, lts, lrs, [alone[p] for p in range(model.num_layers)])


def _own_scores(
    model: Model, runs: Sequence[Run], distance: Distance
) -> tuple[list[float], list[float]]:
    """LTS and LRS of each layer, from runs at full precision."""
    count = sum(run.tokens.numel() for run in runs)
    lts, lrs = [], []
    for p in range(model.num_layers):
        transformed = replaced = 0.0
        for run in runs:
            x, full = run.entering(p), run.entering(p + 1)
            transformed += _sum(full, x, distance)
            replaced += _sum(full, model.layer(x, p, Variant.INT4), distance)
        lts.append(transformed / count)
        lrs.append(replaced / count)
    return lts, lrs


def _model_scores(
    model: Model,
    runs: Sequence[Run],
    taken: Sequence[int],
    distance: Distance,
    on_step: Callable[[], None],
) -> dict[int, float]:
    """MDS of each layer that is not taken yet."""
    sums = {p: 0.0 for p in range(model.num_layers) if p not in taken}
    for run in runs:
        current = model.compact_logits(run.entering(model.num_layers))
        for p in sums:
            replaced = model.compact_logits(run.behind_with(p, Variant.INT4))
            sums[p] += _sum(current, replaced, distance)
            on_step()
    count = sum(run.tokens.numel() for run in runs)
    return {p: total / count for p, total in sums.items()}


def _sum(a: Tensor, b: Tensor, distance: Distance) -> float:
    """Over tokens, of the similarity of two [..., features]; two zero vectors: cosine 0, L2 1."""
    norm_a, norm_b = torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-1)
    if distance is Distance.COSINE:
        values = torch.linalg.vecdot(a, b) / (norm_a * norm_b).clamp(min=_TINY)
    else:
        apart = torch.linalg.vector_norm(a - b, dim=-1)
        values = 1 - apart / (norm_a + norm_b).clamp(min=_TINY)
    return float(values.sum(dtype=torch.double))
