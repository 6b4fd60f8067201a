"""From logits to the next token, one request at a time, the same whatever the batch is.

In vLLM's order: bias, min_tokens and penalties; temperature; min_p; top_k; top_p.
"""

from collections.abc import Sequence
from hashlib import blake2b

from torch import Tensor

from morphserve.runtime.adjustments import Adjustments
from morphserve.runtime.kernels import Draw, Kernels
from morphserve.runtime.messages import TokenLogprobs
from morphserve.runtime.parts import Sampled
from morphserve.runtime.request import Request


class Sampler:
    """Keeps what penalties need from step to step, and nothing else."""

    def __init__(self, kernels: Kernels, eos_token_ids: Sequence[int]) -> None:
        self._kernels = kernels
        self._adjustments = Adjustments(eos_token_ids)

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[Sampled]:
        """The next token of each request from its row of `logits` [len(requests), vocab].

        `logits` are overwritten. A row that is not finite gives no token: a broken model must not
        be answered as text.
        """
        logits = logits.float()
        raw = _raw_logprobs(logits, requests)
        self._adjustments.adjust(logits, requests)
        draws = {i: next_draw(r) for i, r in enumerate(requests) if r.params.temperature > 0}
        tokens = self._kernels.sample(logits, draws)
        if not raw:
            return [Sampled(token) for token in tokens]
        return [
            Sampled(token, None if token is None or i not in raw else _tell(raw[i], token, request))
            for i, (token, request) in enumerate(zip(tokens, requests, strict=True))
        ]


def next_draw(request: Request) -> Draw:
    """How the token after its output is drawn; tokens not known yet count as places."""
    params = request.params
    uniform = uniform_at(params.seed, len(request.output))
    return Draw(params.temperature, params.min_p, params.top_k, params.top_p, uniform)


def uniform_at(seed: int | None, place: int) -> float:
    """A number in [0, 1) that depends on the seed and the token's place in the output alone.

    So a seeded request repeats whatever the batch is and however often it is preempted. A hash, as
    starting a generator for one number takes as long as the rest of the sampling.
    """
    digest = blake2b(b"%d/%d" % (seed or 0, place), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def _raw_logprobs(logits: Tensor, requests: Sequence[Request]) -> dict[int, Tensor]:
    """Row -> log-probabilities [vocab], of the requests that want some."""
    rows = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
    if not rows:
        return {}
    return dict(zip(rows, logits[rows].log_softmax(dim=-1), strict=True))


def _tell(logprobs: Tensor, token: int, request: Request) -> TokenLogprobs:
    values, ids = logprobs.topk(min(request.params.logprobs or 0, logprobs.numel()))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(logprobs[token]), top)
