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


class BruteForce:
    """Algorithm 1 by whole forward passes, nothing reused."""

    def __init__(self, model: Model, tokens: Tensor) -> None:
        self.model = model
        self.tokens = tokens

    def states(self, int4: set[int]) -> list[Tensor]:
        states = [self.model.embed(self.tokens)]
        for i in range(self.model.num_layers):
            states.append(self.model.layer(states[-1], i, i in int4))
        return states

    def output(self, int4: set[int]) -> Tensor:
        return self.model.logits(self.states(int4)[-1])

    def lis(self, p: int, taken: set[int]) -> float:
        full = self.states(set())
        lts = cosine(full[p + 1], full[p])
        lrs = cosine(full[p + 1], self.model.layer(full[p], p, int4=True))
        mds = cosine(self.output(taken), self.output(taken | {p}))
        return 0.25 * lts + 0.25 * lrs + 0.5 * mds

    def rank(self) -> list[tuple[int, float]]:
        ranked: list[tuple[int, float]] = []
        while len(ranked) < self.model.num_layers:
            taken = {layer for layer, _ in ranked}
            rest = [p for p in range(self.model.num_layers) if p not in taken]
            ranked.append(max(((p, self.lis(p, taken)) for p in rest), key=lambda pair: pair[1]))
        return ranked


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1).mean())


@pytest.fixture(params=["llama", "qwen3"])
def model(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tiny_bundle: Callable[[str], Path],
) -> Model:
    checkpoint = open_checkpoint(str(tiny_model(request.param)))
    return Model(checkpoint, open_bundle(str(tiny_bundle(request.param)), checkpoint))


@torch.inference_mode()
def test_states_of_zeros_are_ranked_too(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = model.embed
    monkeypatch.setattr(type(model), "embed", lambda _, tokens: 0 * embed(tokens))
    ranked = rank_layers(model, torch.zeros((1, 8), dtype=torch.int64))
    assert not any(math.isnan(entry.score) for entry in ranked)


@torch.inference_mode()
def test_the_ranking_is_that_of_brute_force(model: Model) -> None:
    # 40 windows of 64 tokens make two batches.
    tokens = torch.randint(0, 256, (40, 64), generator=torch.Generator().manual_seed(5))
    steps: list[None] = []
    ranked = rank_layers(model, tokens, lambda: steps.append(None))
    expected = BruteForce(model, tokens).rank()
    assert [entry.layer for entry in ranked] == [layer for layer, _ in expected]
    assert [entry.score for entry in ranked] == pytest.approx([s for _, s in expected], abs=1e-6)
    assert len(steps) == 2 * 6
