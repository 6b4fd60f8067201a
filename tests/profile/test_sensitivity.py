"""LIS is Algorithm 1, to the layer."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.profile.mixes import Model
from morphserve.profile.sensitivity import rank_layers
from morphserve.quantize.bundle import open_bundle
from morphserve.quantize.checkpoint import open_checkpoint
from morphserve.quantize.manifest import Distance, LisSettings, Variant

FULL, INT4 = Variant.FULL, Variant.INT4


class BruteForce:
    """Algorithm 1 by whole forward passes, nothing reused."""

    def __init__(self, model: Model, tokens: Tensor, settings: LisSettings) -> None:
        self.model, self.tokens, self.weights = model, tokens, settings.weights
        self.similar = cosine if settings.distance is Distance.COSINE else l2

    def states(self, int4: set[int]) -> list[Tensor]:
        states = [self.model.embed(self.tokens)]
        for i in range(self.model.num_layers):
            states.append(self.model.layer(states[-1], i, INT4 if i in int4 else FULL))
        return states

    def output(self, int4: set[int]) -> Tensor:
        return self.model.logits(self.states(int4)[-1])

    def lis(self, p: int, taken: set[int]) -> float:
        full = self.states(set())
        lts = self.similar(full[p + 1], full[p])
        lrs = self.similar(full[p + 1], self.model.layer(full[p], p, INT4))
        mds = self.similar(self.output(taken), self.output(taken | {p}))
        return sum(w * s for w, s in zip(self.weights, (lts, lrs, mds), strict=True))

    def rank(self) -> list[tuple[int, float]]:
        ranked: list[tuple[int, float]] = []
        while len(ranked) < self.model.num_layers:
            taken = {layer for layer, _ in ranked}
            rest = [p for p in range(self.model.num_layers) if p not in taken]
            ranked.append(max(((p, self.lis(p, taken)) for p in rest), key=lambda pair: pair[1]))
        return ranked


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1).mean())


def l2(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((1 - (a - b).norm(dim=-1) / (a.norm(dim=-1) + b.norm(dim=-1))).mean())


@pytest.fixture(params=["llama", "qwen3"])
def model(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tiny_bundle: Callable[[str], Path],
) -> Model:
    checkpoint = open_checkpoint(str(tiny_model(request.param)))
    return Model(checkpoint, open_bundle(str(tiny_bundle(request.param)), checkpoint))


@torch.inference_mode()
@pytest.mark.parametrize("distance", list(Distance))
def test_states_of_zeros_are_ranked_too(
    model: Model, distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = model.embed
    monkeypatch.setattr(type(model), "embed", lambda _, tokens: 0 * embed(tokens))
    tokens = torch.zeros((1, 8), dtype=torch.int64)
    found = rank_layers(model, tokens, LisSettings(distance=distance))
    assert not any(math.isnan(entry.score) for entry in found.order)


@torch.inference_mode()
@pytest.mark.parametrize(
    "settings",
    [
        LisSettings(),
        LisSettings(weights=(0.0, 0.0, 1.0)),
        LisSettings(distance=Distance.L2),
        LisSettings(weights=(0.1, 0.6, 0.3), distance=Distance.L2),
    ],
)
def test_the_ranking_is_that_of_brute_force(model: Model, settings: LisSettings) -> None:
    # 40 windows of 64 tokens make two batches.
    tokens = torch.randint(0, 256, (40, 64), generator=torch.Generator().manual_seed(5))
    steps: list[None] = []
    found = rank_layers(model, tokens, settings, lambda: steps.append(None))
    brute = BruteForce(model, tokens, settings)
    expected = brute.rank()
    assert [entry.layer for entry in found.order] == [layer for layer, _ in expected]
    scores = [entry.score for entry in found.order]
    assert scores == pytest.approx([score for _, score in expected], abs=1e-6)
    assert len(steps) == 2 * 6
    a1, a2, b = settings.weights
    for p in range(3):
        alone = a1 * found.lts[p] + a2 * found.lrs[p] + b * found.mds[p]
        assert alone == pytest.approx(brute.lis(p, set()), abs=1e-6)


class Turning:
    """A model whose INT4 layers turn states by an angle, the more the later: LIS is 0, 1, 2, ..."""

    num_layers = 24

    def __init__(self) -> None:
        self.calls = 0

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).expand(*tokens.shape, 2)

    def layer(self, x: Tensor, i: int, variant: Variant) -> Tensor:
        self.calls += 1
        angle = torch.tensor(0.01 * (i + 1) if variant is INT4 else 0.0)
        cos, sin = angle.cos(), angle.sin()
        return x @ torch.stack((torch.stack((cos, sin)), torch.stack((-sin, cos))))

    def compact_logits(self, x: Tensor) -> Tensor:
        return x


def test_layers_before_a_candidate_are_not_computed_again() -> None:
    model = Turning()
    found = rank_layers(model, torch.zeros((1, 4), dtype=torch.int64))  # type: ignore[arg-type]
    assert [entry.layer for entry in found.order] == list(range(24))
    whole_forwards = 24 * 25 // 2 * 24
    assert model.calls < 0.42 * whole_forwards
