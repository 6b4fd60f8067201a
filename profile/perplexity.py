"""What a mix of layer variants costs in quality."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.profile.mixes import Mix, Model, Run, batches, mix_of
from morphserve.quantize.bundle import Bundle
from morphserve.quantize.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Quality:
    perplexity: float
    divergence: float  # KL from full precision, nats per token


def perplexity(
    checkpoint: Checkpoint, bundle: Bundle | None, int4_layers: Collection[int], windows: Tensor
) -> float:
    """Perplexity over [n, length] token windows with these layers at INT4, in float32."""
    mix = mix_of(int4_layers, checkpoint.architecture.num_layers)
    return measure(Model(checkpoint, bundle), windows, [mix])[mix].perplexity


def measure(
    model: Model,
    windows: Tensor,
    mixes: Collection[Mix],
    on_step: Callable[[], None] = lambda: None,
) -> dict[Mix, Quality]:
    """Quality of each mix over [n, length] token windows.

    `on_step` is called for each mix of each batch. Neighbours in the order of computing are alike
    in their first layers, so that a Run computes little.
    """
    ordered = sorted(set(mixes))
    surprise = dict.fromkeys(ordered, 0.0)
    divergence = dict.fromkeys(ordered, 0.0)
    with torch.inference_mode():
        for batch in batches(windows):
            run = Run(model, batch)
            full = Reference(run.logits()[:, :-1])
            for mix in ordered:
                run.change(mix)
                mixed = F.log_softmax(run.logits()[:, :-1], dim=-1)
                surprise[mix] += float(surprises(mixed, batch).sum(dtype=torch.double))
                divergence[mix] += float(full.divergences(mixed).sum(dtype=torch.double))
                on_step()
    count = windows[:, 1:].numel()
    return {
        mix: Quality(math.exp(surprise[mix] / count), divergence[mix] / count) for mix in ordered
    }


class Reference:
    """The distributions of full precision, which others diverge from."""

    def __init__(self, logits: Tensor) -> None:
        self._log = F.log_softmax(logits, dim=-1)  # [..., vocab]
        self._probabilities = self._log.exp()

    def divergences(self, mixed: Tensor) -> Tensor:
        """KL(full || mixed) of each token, from log-probabilities."""
        divergences: Tensor = torch.linalg.vecdot(self._probabilities, self._log - mixed)
        return divergences


def surprises(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Of each next token: [n, length - 1, vocab] and [n, length] token ids to [n, length - 1]."""
    return -log_probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1)
