"""From logits to the next token, one request at a time, the same whatever the batch is."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from morphserve.runtime.request import Request


def sample(logits: Tensor, requests: Sequence[Request], eos: Sequence[int]) -> list[int]:
    """The next token of each request from its row of `logits` [len(requests), vocab]."""
    for row, request in zip(logits, requests, strict=True):
        _forbid_early_stop(row, request, eos)
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for i, request in enumerate(requests):
        if request.params.temperature > 0:
            tokens[i] = _draw(logits[i].float(), request)
    return tokens


def _forbid_early_stop(row: Tensor, request: Request, eos: Sequence[int]) -> None:
    params = request.params
    if len(request.output) < params.min_tokens and not params.ignore_eos:
        row[[*eos, *params.stop_token_ids]] = float("-inf")


def _draw(logits: Tensor, request: Request) -> int:
    """Inverse-CDF sampling over the kept tokens, most likely first.

    The random number depends on the seed and the token's place in the output alone, so that a
    seeded request repeats whatever the batch is and however often it is preempted.
    """
    params = request.params
    ordered, ids = (logits / params.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    keep = params.top_k if params.top_k > 0 else ordered.numel()
    cumulative = ordered[:keep].cumsum(dim=0)
    if params.top_p < 1:
        nucleus = int(torch.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1
        cumulative = cumulative[:nucleus]
    draw = random.Random(f"{params.seed}/{len(request.output)}").random()
    place = torch.searchsorted(cumulative, draw * cumulative[-1], right=True)
    return int(ids[min(int(place), cumulative.numel() - 1)])
