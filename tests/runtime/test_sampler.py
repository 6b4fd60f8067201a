"""Sampling: what is kept, how often it is drawn, and that it repeats."""

from collections import Counter

import pytest
import torch

from morphserve.runtime import sampler
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.sampler import sample

VOCAB = 50
LOGITS = torch.linspace(3.0, -3.0, VOCAB).roll(17)


def draws(count: int, **params: object) -> list[int | None]:
    chosen: list[int | None] = []
    for seed in range(count):
        sampling = SamplingParams(max_tokens=9, seed=seed, **params)  # type: ignore[arg-type]
        chosen += sample(LOGITS.clone()[None], [Request("x", [1], sampling, 0.0)], eos=[17])
    return chosen


def test_tokens_come_as_often_as_they_are_likely() -> None:
    counts = Counter(draws(4000))
    probabilities = LOGITS.softmax(-1)
    for token in (17, 18, 25):
        assert counts[token] / 4000 == pytest.approx(float(probabilities[token]), abs=0.02)


def test_top_k_keeps_the_k_most_likely() -> None:
    assert set(draws(300, top_k=3)) == {17, 18, 19}
    assert set(draws(20, top_k=1)) == {17}


def test_top_p_keeps_the_fewest_that_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cumulative = LOGITS.softmax(-1).sort(descending=True).values.cumsum(0)
    count = int((cumulative < 0.5).sum()) + 1
    kept = {17 + i for i in range(count)}
    assert set(draws(500, top_p=0.5)) == kept
    whole = draws(200, top_p=0.9)
    monkeypatch.setattr(sampler, "NUCLEUS", 2)  # the nucleus does not fit the first few
    assert draws(200, top_p=0.9) == whole


def test_greedy_ignores_the_seed() -> None:
    assert set(draws(5, temperature=0.0)) == {17}


def test_nothing_ends_before_min_tokens() -> None:
    assert 17 not in draws(50, temperature=0.0, min_tokens=1)
    assert draws(1, temperature=0.0, min_tokens=1, ignore_eos=True) == [17]
    stop = {"stop_token_ids": (17,), "ignore_eos": True}
    assert draws(1, temperature=0.0, min_tokens=1, **stop) == [18]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_no_token(broken: float) -> None:
    logits = torch.stack((LOGITS, LOGITS))
    logits[1, 3] = broken
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    requests = [Request(name, [1], greedy, 0.0) for name in "ab"]
    assert sample(logits, requests, eos=[]) == [17, None]
