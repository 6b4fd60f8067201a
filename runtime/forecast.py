"""What the cost model says of steps to come, corrected by how the latest steps went."""

from collections.abc import Sequence

import numpy as np

from morphserve.quantize.manifest import Variant
from morphserve.runtime.costs import AttentionCost, CostModel, Span, interpolate
from morphserve.runtime.ladder import Ladder

_LEAST_SLOWDOWN, _MOST_SLOWDOWN = 0.5, 2.0  # beyond, the model is wrong rather than the machine
_MEMORY = 0.9  # of a rolling mean over steps: the latest ten or so count


class Forecaster:
    """Predicted seconds of steps at every rung."""

    def __init__(
        self, model: CostModel, ladder: Ladder, num_rungs: int, max_step_tokens: int
    ) -> None:
        self.max_step_tokens = max_step_tokens
        self.slowdown = 1.0  # measured over predicted, a rolling mean
        self.pace = 1.0  # the same without bounds
        self._model = model
        self._variants = list(model.layers)
        rungs = [ladder.variants_at(rung) for rung in range(num_rungs)]
        self._counts = np.array([[v.count(variant) for variant in self._variants] for v in rungs])
        self._num_layers = ladder.num_layers

    def step_seconds(self, variants: Sequence[Variant], spans: Sequence[Span]) -> float:
        """Of one step, as the model says it, without correction."""
        return self._model.step_seconds(variants, spans)

    def observe(self, measured_s: float, predicted_s: float) -> None:
        """Learns from one step how this machine is doing now."""
        pace = measured_s / predicted_s
        self.pace = _MEMORY * self.pace + (1 - _MEMORY) * pace
        ratio = min(max(pace, _LEAST_SLOWDOWN), _MOST_SLOWDOWN)
        self.slowdown = _MEMORY * self.slowdown + (1 - _MEMORY) * ratio

    def decode_s(self, num_decodes: int, context_tokens: int) -> tuple[float, ...]:
        """A decode step at each rung; `context_tokens` are those of all sequences together."""
        attention = _attention(self._model.decode, num_decodes, context_tokens)
        return self._at_each_rung(num_decodes, num_decodes, attention)

    def chunk_s(self, num_decodes: int, context_tokens: int) -> tuple[float, ...]:
        """The same step, filled up with one prompt's first tokens."""
        chunk = max(1, self.max_step_tokens - num_decodes)
        attention = _attention(self._model.decode, num_decodes, context_tokens)
        attention += _attention(self._model.prefill, chunk, chunk * (chunk + 1) / 2)
        return self._at_each_rung(num_decodes + chunk, num_decodes + 1, attention)

    def _at_each_rung(self, tokens: int, num_seqs: int, attention_s: float) -> tuple[float, ...]:
        layers = [interpolate(self._model.layers[variant], tokens) for variant in self._variants]
        rest = interpolate(self._model.rest, num_seqs) + self._num_layers * attention_s
        return tuple(((self._counts @ layers + rest) * self.slowdown).tolist())


def forecaster(
    model: CostModel | None, ladder: Ladder, num_rungs: int, max_step_tokens: int
) -> Forecaster | None:
    """None if a variant that these rungs use was not measured, or nothing was."""
    used = {Variant.FULL, *(step.to for step in ladder.steps[: num_rungs - 1])}
    if model is None or not used <= model.layers.keys():
        return None
    return Forecaster(model, ladder, num_rungs, max_step_tokens)


def _attention(cost: AttentionCost, queries: int, pairs: float) -> float:
    return cost.of(queries, pairs) if queries else 0.0
