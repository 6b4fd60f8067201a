"""From logits to the next token, one request at a time, the same whatever the batch is."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from morphserve.runtime.request import Request

NUCLEUS = 1024  # most likely tokens that nearly always hold the nucleus


def sample(logits: Tensor, requests: Sequence[Request], eos: Sequence[int]) -> list[int | None]:
    """The next token of each request from its row of `logits` [len(requests), vocab].

    None where a row holds NaN or infinity: a broken model must not be answered as text.
    """
    sound = logits.isfinite().all(dim=-1).tolist()
    for row, request in zip(logits, requests, strict=True):
        _forbid_early_stop(row, request, eos)
    tokens: list[int | None] = logits.argmax(dim=-1).tolist()
    for i, request in enumerate(requests):
        if not sound[i]:
            tokens[i] = None
        elif request.params.temperature > 0:
            tokens[i] = _draw(logits[i].float(), request)
    return tokens


def _forbid_early_stop(row: Tensor, request: Request, eos: Sequence[int]) -> None:
    params = request.params
    if len(request.output) < params.min_tokens:
        row[[*params.stop_token_ids, *(() if params.ignore_eos else eos)]] = float("-inf")


def _draw(logits: Tensor, request: Request) -> int:
    """Inverse-CDF sampling over the kept tokens.

    The random number depends on the seed and the token's place in the output alone, so that a
    seeded request repeats whatever the batch is and however often it is preempted.
    """
    params = request.params
    probabilities, ids = _keep((logits / params.temperature).softmax(dim=-1), request)
    cumulative = probabilities.cumsum(dim=0)
    draw = random.Random(f"{params.seed}/{len(request.output)}").random()
    place = int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True))
    place = min(place, cumulative.numel() - 1)
    return place if ids is None else int(ids[place])


def _keep(probabilities: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
    """The tokens that top-k and top-p leave, most likely first, and their ids; None: all, by id."""
    top_k, top_p, vocab = request.params.top_k, request.params.top_p, probabilities.numel()
    if not top_k and top_p >= 1:
        return probabilities, None
    limit = min(top_k or vocab, vocab)
    first = limit if top_k else min(limit, NUCLEUS)  # sorting a few is far cheaper than sorting all
    for width in (first, limit):
        kept, ids = probabilities.topk(width)
        total = kept.sum() if top_k else probabilities.sum()
        nucleus = int((kept.cumsum(dim=0) < top_p * total).sum()) + 1
        if width == limit or nucleus < width:
            break
    count = min(nucleus, width) if top_p < 1 else width
    return kept[:count], ids[:count]
