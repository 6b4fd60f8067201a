"""What a mix of full-precision and INT4 layers costs in quality."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.profile.mixes import Model, Run, batches
from morphserve.quantize.bundle import Bundle
from morphserve.quantize.checkpoint import Checkpoint

Mix = frozenset[int]  # the layers that are INT4


@dataclass(frozen=True, slots=True)
class Quality:
    perplexity: float
    divergence: float  # KL from full precision, nats per token


def perplexity(
    checkpoint: Checkpoint, bundle: Bundle | None, int4_layers: Collection[int], windows: Tensor
) -> float:
    """Perplexity over [n, length] token windows with these layers at INT4, in float32."""
    mix = frozenset(int4_layers)
    return measure(Model(checkpoint, bundle), windows, [mix])[mix].perplexity


def measure(
    model: Model,
    windows: Tensor,
    mixes: Collection[Mix],
    on_step: Callable[[], None] = lambda: None,
) -> dict[Mix, Quality]:
    """Quality of each mix over [n, length] token windows; `on_step` is called after each."""
    ordered = _by_common_prefix(mixes, model.num_layers)
    surprise = dict.fromkeys(ordered, 0.0)
    divergence = dict.fromkeys(ordered, 0.0)
    with torch.inference_mode():
        for batch in batches(windows):
            run = Run(model, batch)
            full = F.log_softmax(run.logits()[:, :-1], dim=-1)
            for mix in ordered:
                run.change(mix)
                mixed = F.log_softmax(run.logits()[:, :-1], dim=-1)
                chosen = mixed.gather(-1, batch[:, 1:, None])
                surprise[mix] -= float(chosen.sum(dtype=torch.double))
                divergence[mix] += float(_divergence(full, mixed))
                on_step()
    count = windows[:, 1:].numel()
    return {
        mix: Quality(math.exp(surprise[mix] / count), divergence[mix] / count) for mix in ordered
    }


def _divergence(full: Tensor, mixed: Tensor) -> Tensor:
    """Sum over tokens of KL(full || mixed), from log-probabilities."""
    return (full.exp() * (full - mixed)).sum(dtype=torch.double)


def _by_common_prefix(mixes: Collection[Mix], num_layers: int) -> Sequence[Mix]:
    """Without repeats, neighbours alike in their first layers, so that a Run computes little."""
    return sorted(set(mixes), key=lambda mix: [i in mix for i in range(num_layers)])
