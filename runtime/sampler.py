"""From logits to the next token, one request at a time, the same whatever the batch is.

In vLLM's order: bias, min_tokens and penalties; temperature; min_p; top_k; top_p.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from morphserve.runtime.adjustments import Adjustments, changes_logits
from morphserve.runtime.messages import TokenLogprobs
from morphserve.runtime.parts import Sampled
from morphserve.runtime.request import Request, SamplingParams

NUCLEUS = 1024  # most likely tokens that nearly always hold the nucleus


class Sampler:
    """Keeps what penalties need from step to step, and nothing else."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos = eos_token_ids
        self._adjustments = Adjustments()

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[Sampled]:
        """The next token of each request from its row of `logits` [len(requests), vocab].

        `logits` are overwritten. A row that is not finite gives no token: a broken model must not
        be answered as text.
        """
        sound = logits.isfinite().all(dim=-1).tolist()
        raw = _raw_logprobs(logits, requests)
        logits = self._adjusted(logits, requests)
        tokens: list[int | None] = logits.argmax(dim=-1).tolist()
        for i, request in enumerate(requests):
            if not sound[i]:
                tokens[i] = None
            elif request.params.temperature > 0:
                tokens[i] = _draw(logits[i].float(), request)
        return [
            Sampled(token, None if token is None or i not in raw else _tell(raw[i], token, request))
            for i, (token, request) in enumerate(zip(tokens, requests, strict=True))
        ]

    def _adjusted(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        self._adjustments.drop_finished()
        changed = [i for i, request in enumerate(requests) if changes_logits(request.params)]
        if changed:
            logits = logits.float()
        for i in changed:
            self._adjustments.apply(logits[i], requests[i])
        for i, request in enumerate(requests):
            if len(request.output) < request.params.min_tokens:
                logits[i, self._endings(request.params)] = float("-inf")
        return logits

    def _endings(self, params: SamplingParams) -> list[int]:
        return [*params.stop_token_ids, *(() if params.ignore_eos else self._eos)]


def kept(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """What one token is drawn from: probabilities, not scaled to 1, and their token ids.

    The likeliest first; ids None: all of the vocabulary, by id, some perhaps with probability 0.
    """
    probabilities = (logits / params.temperature).softmax(dim=-1)
    if params.min_p > 0:
        least = params.min_p * probabilities.max()
        probabilities = probabilities.where(probabilities >= least, 0.0)
    top_k, top_p, vocab = params.top_k, params.top_p, probabilities.numel()
    if not top_k and top_p >= 1:
        return probabilities, None
    limit = min(top_k or vocab, vocab)
    first = limit if top_k else min(limit, NUCLEUS)  # sorting a few is far cheaper than sorting all
    for width in (first, limit):
        likeliest, ids = probabilities.topk(width)
        total = likeliest.sum() if top_k else probabilities.sum()
        nucleus = int((likeliest.cumsum(dim=0) < top_p * total).sum()) + 1
        if width == limit or nucleus < width:
            break
    count = min(nucleus, width) if top_p < 1 else width
    return likeliest[:count], ids[:count]


def _draw(logits: Tensor, request: Request) -> int:
    """Inverse-CDF sampling over the kept tokens.

    The random number depends on the seed and the token's place in the output alone, so that a
    seeded request repeats whatever the batch is and however often it is preempted.
    """
    probabilities, ids = kept(logits, request.params)
    cumulative = probabilities.cumsum(dim=0)
    draw = random.Random(f"{request.params.seed}/{len(request.output)}").random()
    place = int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True))
    if place == cumulative.numel():  # the product was rounded up to the whole
        place = int(probabilities.nonzero()[-1])
    return place if ids is None else int(ids[place])


def _raw_logprobs(logits: Tensor, requests: Sequence[Request]) -> dict[int, Tensor]:
    """Row -> log-probabilities [vocab], of the requests that want some."""
    rows = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
    if not rows:
        return {}
    return dict(zip(rows, logits[rows].float().log_softmax(dim=-1), strict=True))


def _tell(logprobs: Tensor, token: int, request: Request) -> TokenLogprobs:
    values, ids = logprobs.topk(min(request.params.logprobs or 0, logprobs.numel()))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(logprobs[token]), top)
