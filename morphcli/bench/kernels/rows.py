"""What works row by row: norm, activation, sampling."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from morphserve.morphcli.bench.kernels.race import Task
from morphserve.morphcli.bench.kernels.random_values import bell
from morphserve.runtime.kernels import Kernels
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.sampler import Sampler

ROWS = (1, 32, 512)
HIDDEN, INNER = 2048, 5632  # of a 1B-class model
VOCAB, SAMPLED_ROWS = 32000, 32
TEMPERATURE, TOP_P = 0.8, 0.95
EPS = 1e-5


def row_tasks(kernels: Kernels) -> Iterator[list[Task]]:
    dtype = kernels.activation_dtype(kernels.weight_dtype(torch.bfloat16))
    for rows in ROWS:
        yield [_norm(kernels, rows, dtype)]
        yield [_silu(kernels, rows, dtype)]


def sampler_tasks(kernels: Kernels) -> Iterator[list[Task]]:
    logits = 4 * bell(SAMPLED_ROWS, VOCAB, seed=0)  # a nucleus of some hundred tokens
    greedy = SamplingParams(max_tokens=2, temperature=0.0)
    drawn = SamplingParams(max_tokens=2, temperature=TEMPERATURE, top_p=TOP_P, seed=0)
    yield [_sampling("sampler, greedy", kernels, logits, greedy)]
    yield [_sampling("sampler, top-p", kernels, logits, drawn)]


def _norm(kernels: Kernels, rows: int, dtype: torch.dtype) -> Task:
    x, weight = bell(rows, HIDDEN, seed=0, dtype=dtype), torch.ones(HIDDEN, dtype=dtype)
    own, theirs = torch.zeros_like(x), torch.zeros(rows, HIDDEN, dtype=torch.bfloat16)
    half, half_weight = x.bfloat16(), weight.bfloat16()

    def refresh() -> None:  # sums would grow from call to call
        own.zero_()
        theirs.zero_()

    return Task(
        kernel="add, RMSNorm",
        size=f"hidden {HIDDEN}",
        rows=rows,
        work=None,
        ours=lambda _: kernels.add_rms_norm(x, own, weight, EPS),
        torch={
            "rms_norm": lambda _: F.rms_norm(theirs.add_(half), (HIDDEN,), half_weight, EPS),
        },
        refresh=refresh,
    )


def _silu(kernels: Kernels, rows: int, dtype: torch.dtype) -> Task:
    x = bell(rows, 2 * INNER, seed=0, dtype=dtype)
    half = x.bfloat16()

    def in_torch(_: int) -> Tensor:
        gate, up = half.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    return Task(
        kernel="SiLU, product",
        size=f"inner {INNER}",
        rows=rows,
        work=None,
        ours=lambda _: kernels.silu_mul(x),
        torch={"silu, mul_": in_torch},
    )


def _sampling(name: str, kernels: Kernels, logits: Tensor, params: SamplingParams) -> Task:
    sampler, scratch = Sampler(kernels, ()), logits.clone()
    requests = [Request(str(i), [0], params, 0.0) for i in range(len(logits))]

    def ours(_: int) -> Tensor:
        return torch.tensor([got.token for got in sampler.sample(scratch, requests)])

    def in_torch(_: int) -> Tensor:
        return torch.tensor(_torch_tokens(scratch, params))

    return Task(
        kernel=name,
        size=f"vocabulary {logits.shape[1]}",
        rows=len(logits),
        work=None,
        ours=ours,
        torch={"argmax" if not params.temperature else "sort, multinomial": in_torch},
        refresh=lambda: scratch.copy_(logits),
    )


def _torch_tokens(logits: Tensor, params: SamplingParams) -> Sequence[int]:
    if not params.temperature:
        return logits.argmax(dim=-1).tolist()
    likeliest, ids = (logits / params.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = likeliest.cumsum(dim=-1) - likeliest
    kept = likeliest.masked_fill(before >= params.top_p, 0.0)
    return ids.gather(1, kept.multinomial(1)).flatten().tolist()
