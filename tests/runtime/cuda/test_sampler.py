"""The GPU's sampler gives what the CPU's gives, in whatever mixture of requests."""

import pytest
import torch
from torch import Tensor

from morphserve.runtime.cuda.sampler import DeviceSampler
from morphserve.runtime.kernels.reference import ReferenceKernels
from morphserve.runtime.parts import Sampled
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.sampler import Sampler

VOCAB, EOS = 120, [17, 18]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def request(output: list[int], **params: object) -> Request:
    sampling = SamplingParams(**{"max_tokens": 99, "temperature": 0.0} | params)  # type: ignore[arg-type]
    return Request("x", [3, 50], sampling, 0.0, output=list(output))


def mixture() -> list[Request]:
    return [
        request([]),
        request([5], temperature=0.8, seed=1),
        request([5, 6], temperature=1.2, seed=2, top_p=0.9, min_p=0.01),
        request([5], logit_bias={90: 50.0, 7: -2.0}, logprobs=3),
        request([], temperature=1.5, seed=3, top_k=9, min_tokens=4, logprobs=0),
        request([17], min_tokens=1, presence_penalty=1.0, frequency_penalty=0.5),
        request([8, 8], repetition_penalty=1.7, temperature=0.5, seed=4, logprobs=9),
        request([], min_tokens=3, ignore_eos=True, stop_token_ids=(40, 41), temperature=1e300),
    ]


def logits(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    rows = torch.randn(count, VOCAB) * 3
    rows[:, EOS] += 9  # likely, unless ruled out
    return rows.to(dtype)


def chosen(rows: Tensor, requests: list[Request], device: str) -> list[Sampled]:
    return DeviceSampler(EOS).launch(rows.clone().to(device), requests).result()


def check_equal(got: list[Sampled], expected: list[Sampled]) -> None:
    assert [one.token for one in got] == [one.token for one in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.logprobs is None) is (theirs.logprobs is None)
        if ours.logprobs and theirs.logprobs:
            assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-5)
            assert [t for t, _ in ours.logprobs.top] == [t for t, _ in theirs.logprobs.top]
            values = [value for _, value in theirs.logprobs.top]
            assert [v for _, v in ours.logprobs.top] == pytest.approx(values, abs=1e-5)


def test_mixtures_get_what_the_cpus_sampler_gives_step_after_step(device: str) -> None:
    ours, theirs, requests = DeviceSampler(EOS), Sampler(ReferenceKernels(), EOS), mixture()
    for step, dtype in enumerate(DTYPES):
        rows = logits(len(requests), dtype, step)
        if dtype == torch.bfloat16:  # likely tokens to tell must not be equal
            rows = logits(1, dtype, step).expand(len(requests), -1).clone()
            rows[:, 10:20] = torch.linspace(6, 7, 10).flip(0)
        choice = ours.launch(rows.clone().to(device), requests)
        expected = theirs.sample(rows.clone(), requests)
        check_equal(choice.result(), expected)
        assert choice.tokens.tolist() == [one.token for one in expected]
        for of, one in zip(requests, expected, strict=True):
            assert one.token is not None
            of.output.append(one.token)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_greedy_batch_draws_nothing(dtype: torch.dtype, device: str) -> None:
    rows, requests = logits(3, dtype), [request([i]) for i in range(3)]
    expected = [Sampled(token) for token in rows.float().argmax(-1).tolist()]
    assert chosen(rows, requests, device) == expected


def test_a_token_that_is_not_known_yet_counts_as_a_place(device: str) -> None:
    asked = {"temperature": 2.0, "min_tokens": 3, "logit_bias": {4: 1.0}}
    rows = logits(1, torch.float32).expand(6, -1).clone()
    known = [request([5, 9], seed=seed, **asked) for seed in range(6)]
    pending = [request([5, -1], seed=seed, **asked) for seed in range(6)]
    got = chosen(rows, pending, device)
    assert got == chosen(rows, known, device)
    shorter = chosen(rows, [request([5], seed=seed, **asked) for seed in range(6)], device)
    assert got != shorter
    assert not {one.token for one in got} & set(EOS)


def test_a_row_that_is_not_finite_gives_no_token(device: str) -> None:
    rows = logits(4, torch.bfloat16)
    rows[1, 3], rows[2, 119], rows[3, 0] = float("nan"), float("inf"), float("-inf")
    requests = [
        request([], logprobs=1),
        request([]),
        request([1], logprobs=2, presence_penalty=1.0, temperature=0.7),
        request([], temperature=1.0, min_tokens=2),
    ]
    got = chosen(rows, requests, device)
    assert got[0].token is not None and got[0].logprobs is not None
    assert got[1:] == [Sampled(None)] * 3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_gpu_before_the_result_is_wanted(dtype: torch.dtype) -> None:
    sampler, requests = DeviceSampler(EOS), mixture()
    rows = logits(len(requests), dtype).cuda()
    for _ in range(2):  # the first compiles, and pins as much memory as two launches need at once
        torch.cuda._sleep(10**9)  # cycles: about half a second
        torch.cuda.set_sync_debug_mode("error")
        try:
            choices = [sampler.launch(rows.clone(), requests) for _ in range(2)]
            done = torch.cuda.current_stream().query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results = [choice.result() for choice in choices]
    assert not done
    assert results[0] == results[1]
