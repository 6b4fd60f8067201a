"""Sampling: what is kept, how often it is drawn, that it repeats, and what is told beside it."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from morphserve.runtime.kernels import Draw, Kernels, drawing
from morphserve.runtime.kernels.drawing import kept
from morphserve.runtime.parts import Sampled
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.sampler import Sampler

VOCAB = 50
LOGITS = torch.linspace(3.0, -3.0, VOCAB).roll(17)


def sampling(**params: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 9} | params)  # type: ignore[arg-type]


def draws(kernels: Kernels, count: int, **params: object) -> list[int | None]:
    requests = [Request("x", [1], sampling(seed=seed, **params), 0.0) for seed in range(count)]
    return [got.token for got in Sampler(kernels, [17]).sample(LOGITS.repeat(count, 1), requests)]


def distribution(logits: Tensor, **params: float) -> Tensor:
    """Of the next token [vocab]; what is not kept has probability 0."""
    everything = {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0, "uniform": 0.0}
    weights = kept(logits, Draw(**everything | params))  # type: ignore[arg-type]
    return weights / weights.sum()


def theirs(logits: Tensor, *warpers: object) -> Tensor:
    tokens = torch.zeros((1, 1), dtype=torch.int64)
    return LogitsProcessorList(warpers)(tokens, logits[None].clone())[0].softmax(-1)


# In our order, which is vLLM's: temperature, min_p, top_k, top_p.
WARPED = [
    ({"temperature": 0.3}, [TemperatureLogitsWarper(0.3)]),
    ({"temperature": 1.9}, [TemperatureLogitsWarper(1.9)]),
    ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
    ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    ({"top_k": 1}, [TopKLogitsWarper(1)]),
    ({"top_k": 7}, [TopKLogitsWarper(7)]),
    ({"top_k": VOCAB + 1}, [TopKLogitsWarper(VOCAB)]),
    ({"top_p": 0.5}, [TopPLogitsWarper(0.5)]),
    ({"top_p": 0.95}, [TopPLogitsWarper(0.95)]),
    ({"top_k": 9, "top_p": 0.6}, [TopKLogitsWarper(9), TopPLogitsWarper(0.6)]),
    ({"min_p": 0.3, "top_p": 0.6}, [MinPLogitsWarper(0.3), TopPLogitsWarper(0.6)]),
    (
        {"temperature": 1.7, "min_p": 0.1, "top_k": 12, "top_p": 0.8},
        [
            TemperatureLogitsWarper(1.7),
            MinPLogitsWarper(0.1),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.8),
        ],
    ),
]


@pytest.mark.parametrize(("params", "warpers"), WARPED, ids=lambda part: str(part)[:40])
@pytest.mark.parametrize("first", [2, 1024])
def test_what_is_kept_is_what_transformers_keeps(
    params: dict[str, float], warpers: list[object], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "NUCLEUS", first)  # the nucleus fits the first few, or does not
    torch.manual_seed(3)
    for logits in (LOGITS, torch.randn(VOCAB) * 2, torch.randn(VOCAB) * 6):
        ours, reference = distribution(logits, **params), theirs(logits, *warpers)
        assert torch.equal(ours > 0, reference > 0)
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


def test_tokens_come_as_often_as_they_are_likely(kernels: Kernels) -> None:
    counts = Counter(draws(kernels, 4000))
    probabilities = LOGITS.softmax(-1)
    for token in (17, 18, 25):
        assert counts[token] / 4000 == pytest.approx(float(probabilities[token]), abs=0.02)


def test_only_kept_tokens_are_drawn(kernels: Kernels) -> None:
    assert set(draws(kernels, 300, top_k=3)) == {17, 18, 19}
    assert set(draws(kernels, 20, top_k=1)) == {17}
    support = {int(token) for token in distribution(LOGITS, min_p=0.5).nonzero()}
    assert set(draws(kernels, 300, min_p=0.5)) == support


def test_greedy_ignores_the_seed(kernels: Kernels) -> None:
    assert set(draws(kernels, 5, temperature=0.0)) == {17}


def test_nothing_ends_before_min_tokens(kernels: Kernels) -> None:
    assert 17 not in draws(kernels, 50, temperature=0.0, min_tokens=1)
    assert draws(kernels, 1, temperature=0.0, min_tokens=1, ignore_eos=True) == [17]
    stop = {"stop_token_ids": (17,), "ignore_eos": True}
    assert draws(kernels, 1, temperature=0.0, min_tokens=1, **stop) == [18]
    reference = MinNewTokensLengthLogitsProcessor(1, 1, [17])
    prompt = torch.tensor([[1]])
    assert (
        reference(prompt, LOGITS[None].clone()).argmax()
        == draws(kernels, 1, temperature=0.0, min_tokens=1)[0]
    )


def test_a_seeded_request_repeats_whatever_the_batch_is(kernels: Kernels) -> None:
    torch.manual_seed(5)
    logits = torch.randn(4, VOCAB)
    requests = [
        Request(str(i), [i], sampling(seed=i, min_p=0.01, presence_penalty=0.5), 0.0)
        for i in range(4)
    ]
    together = Sampler(kernels, []).sample(logits.clone(), requests)
    alone = [Sampler(kernels, []).sample(logits[[i]], [requests[i]])[0] for i in range(4)]
    assert together == alone


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_no_token(kernels: Kernels, broken: float) -> None:
    logits = torch.stack((LOGITS, LOGITS))
    logits[1, 3] = broken
    greedy = sampling(temperature=0.0)
    requests = [Request(name, [1], greedy, 0.0) for name in "ab"]
    assert Sampler(kernels, []).sample(logits, requests) == [Sampled(17), Sampled(None)]
    asking = sampling(logprobs=2, presence_penalty=1.0, temperature=0.7)
    assert Sampler(kernels, []).sample(logits[1:], [Request("c", [1], asking, 0.0)]) == [
        Sampled(None)
    ]


def test_logprobs_are_of_the_models_own_distribution(kernels: Kernels) -> None:
    changed = sampling(temperature=0.0, logit_bias={40: 100.0}, logprobs=3)
    plain, none = sampling(temperature=0.5, seed=1, logprobs=0), sampling(temperature=0.0)
    requests = [Request(str(i), [1], p, 0.0) for i, p in enumerate((changed, plain, none))]
    got = Sampler(kernels, []).sample(LOGITS.repeat(3, 1), requests)
    expected = LOGITS.log_softmax(-1)
    told = got[0].logprobs
    assert got[0].token == 40 and told is not None
    assert told.logprob == pytest.approx(float(expected[40]))
    assert [token for token, _ in told.top] == [17, 18, 19]
    assert [value for _, value in told.top] == pytest.approx(expected[17:20].tolist())
    assert got[1].logprobs is not None and got[1].token is not None
    assert got[1].logprobs.logprob == pytest.approx(float(expected[got[1].token]))
    assert got[1].logprobs.top == [] and got[2].logprobs is None
