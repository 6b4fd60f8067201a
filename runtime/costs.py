"""How long a step takes, from the times that were measured on this device."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from morphserve.quantize.costs import AttentionTime, Curve, DeviceCosts, LayerTimes
from morphserve.quantize.manifest import Variant

Floats = NDArray[np.float64]
Span = tuple[int, int]  # tokens start..end of one sequence that a step computes


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Seconds of one layer's attention: each term non-negative."""

    per_call: float
    per_pair: float  # of a query and a token it looks at
    per_query: float
    error: float  # mean absolute relative error over the measured points

    def seconds(self, spans: Sequence[Span]) -> float:
        if not spans:
            return 0.0
        queries = sum(end - start for start, end in spans)
        return self.of(queries, _pairs(spans))

    def of(self, queries: int, pairs: float) -> float:
        """So many queries, and pairs of a query and a token it looks at, together."""
        return self.per_call + self.per_pair * pairs + self.per_query * queries


@dataclass(frozen=True, slots=True)
class CostModel:
    """Measured curves are interpolated; attention, which has two sizes, is fitted.

    A decode step reads each token's keys for one query, a prefill for many, so that the two have
    a fit each. Layers are measured with each token seeing itself alone, attention without that.
    The model predicts greedy sampling; drawing takes a little longer.
    """

    layers: dict[Variant, Curve]
    decode: AttentionCost
    prefill: AttentionCost
    rest: Curve

    def step_seconds(self, variants: Sequence[Variant], spans: Sequence[Span]) -> float:
        """A step that computes these spans through layers of these variants."""
        tokens = sum(end - start for start, end in spans)
        decodes = [span for span in spans if span[1] - span[0] == 1]
        prefills = [span for span in spans if span[1] - span[0] > 1]
        attention = self.decode.seconds(decodes) + self.prefill.seconds(prefills)
        return (
            self.rest_seconds(len(spans))
            + self.layers_seconds(variants, tokens)
            + len(variants) * attention
        )

    def layers_seconds(self, variants: Sequence[Variant], tokens: int) -> float:
        """All layers, each token seeing itself alone."""
        return sum(variants.count(v) * self.layer_seconds(v, tokens) for v in set(variants))

    def layer_seconds(self, variant: Variant, tokens: int) -> float:
        """One layer in which each token sees itself alone."""
        return interpolate(self.layers[variant], tokens)

    def rest_seconds(self, num_seqs: int) -> float:
        """Everything but layers, of a step of so many sequences."""
        return interpolate(self.rest, num_seqs)


def cost_model(costs: DeviceCosts) -> CostModel:
    """The model of a device from what was measured on it."""
    return CostModel(
        layers={Variant(times.variant): times.curve for times in costs.layers},
        decode=_fit_attention([time for time in costs.attention if time.query_tokens == 1]),
        prefill=_fit_attention([time for time in costs.attention if time.query_tokens > 1]),
        rest=costs.rest,
    )


def interpolate(curve: Curve, tokens: int) -> float:
    """Seconds by straight lines between measured points; the outer ones go on, none downwards."""
    xs, ys = curve.tokens, curve.seconds
    right = min(max(bisect_right(xs, tokens), 1), len(xs) - 1)
    slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
    if tokens > xs[-1]:
        slope = max(slope, 0.0)
    return ys[right] + slope * (tokens - xs[right])


@dataclass(frozen=True, slots=True)
class Roofline:
    """Device constants that a layer's curve stands for, to extrapolate to other sizes.

    A layer takes sqrt((bytes / bytes_per_s)^2 + (2 * weights * tokens / flops)^2) seconds: a
    smooth maximum of reading its weights and multiplying them.
    """

    bytes_per_s: float
    flops: float
    error: float  # mean absolute relative error over the measured points


def roofline(times: LayerTimes, layer_weights: int) -> Roofline:
    tokens, seconds = np.array(times.curve.tokens), np.array(times.curve.seconds)
    terms = np.stack([np.ones(len(tokens)), (2.0 * layer_weights * tokens) ** 2], axis=1)
    reading, multiplying = np.sqrt(fit(terms, seconds**2))
    predicted = np.hypot(reading, multiplying * 2 * layer_weights * tokens)
    return Roofline(
        bytes_per_s=float(times.num_bytes / reading) if reading else float("inf"),
        flops=float(1 / multiplying) if multiplying else float("inf"),
        error=float(np.abs(predicted / seconds - 1).mean()),
    )


def fit(terms: Floats, values: Floats) -> Floats:
    """Coefficients [k] >= 0 of `terms` [n, k] with the least squared relative error.

    The best non-negative solution is the unbounded one of the terms that it uses: with few terms
    all subsets can be tried. Columns are brought to one size before, as lstsq takes what is 1e15
    times smaller than the rest for nothing.
    """
    relative = terms / values[:, None]
    norms: Floats = np.linalg.norm(relative, axis=0)
    relative /= norms
    best, least = np.zeros(terms.shape[1]), float(len(values))
    for size in range(1, terms.shape[1] + 1):
        for used in combinations(range(terms.shape[1]), size):
            found = np.zeros(terms.shape[1])
            found[list(used)] = np.linalg.lstsq(relative[:, used], np.ones(len(values)))[0]
            error = float(np.square(relative @ found - 1).sum())
            if error < least and (found >= 0).all():
                best, least = found, error
    best /= norms
    return best


def _fit_attention(times: Sequence[AttentionTime]) -> AttentionCost:
    seconds = np.array([time.seconds for time in times])
    terms = np.array([_terms(time) for time in times])
    coefficients = fit(terms, seconds)
    error = float(np.abs(terms @ coefficients / seconds - 1).mean())
    call, pair, query = map(float, coefficients)
    return AttentionCost(call, pair, query, error)


def _terms(time: AttentionTime) -> list[float]:
    """Of AttentionCost: one call, its pairs, its queries."""
    span = (time.context_tokens - time.query_tokens, time.context_tokens)
    return [1.0, time.num_seqs * _pairs([span]), time.num_seqs * time.query_tokens]


def _pairs(spans: Sequence[Span]) -> float:
    """Each token looks at all before it and at itself."""
    return sum((end - start) * (start + end + 1) / 2 for start, end in spans)
