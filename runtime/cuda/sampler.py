"""The GPU's sampler: tokens on the device at once, and what requests get of them when it is done.

Everything is queued on the current stream and nothing waits for it: what goes up and comes down is
one copy each, from and to pinned memory. Drawn tokens are those of runtime/sampler.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from morphserve.runtime.adjustments import Adjustments
from morphserve.runtime.kernels import GREEDY
from morphserve.runtime.kernels.cuda.draws import pack_draws
from morphserve.runtime.kernels.cuda.sampling import choose
from morphserve.runtime.messages import TokenLogprobs
from morphserve.runtime.parts import Sampled
from morphserve.runtime.request import Request
from morphserve.runtime.sampler import next_draw


class DeviceSampler:
    """Keeps what penalties need from step to step, and nothing else."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._adjustments = Adjustments(eos_token_ids)

    def launch(self, logits: Tensor, requests: Sequence[Request]) -> "Choice":
        """Queues the choice of each request's next token from its row of `logits` [n, vocab].

        logits: bfloat16 or float32; overwritten. To be called before the placeholder of the token
        chosen now is appended to an output: the place of a token, which its number is drawn for, is
        the output's length. Placeholders of steps before may be there, except where the request
        `needs_history`.
        """
        asking = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
        # One row after the other: an index would have to be uploaded.
        raw = torch.stack([logits[i] for i in asking]).float().log_softmax(-1) if asking else None
        if any(self._adjustments.concern(request) for request in requests):
            logits = logits.float()
        self._adjustments.adjust(logits, requests)
        draws = [next_draw(r) if r.params.temperature > 0 else GREEDY for r in requests]
        tokens = choose(logits, pack_draws(draws, logits.shape[1], logits.device))
        if raw is None:
            return Choice(tokens, _Readback(tokens), {}, 0)
        width = min(max(requests[i].params.logprobs or 0 for i in asking), raw.shape[1])
        readback = _Readback(torch.cat((tokens, _pack_logprobs(raw, tokens, asking, width))))
        counts = {i: min(requests[i].params.logprobs or 0, width) for i in asking}
        return Choice(tokens, readback, counts, width)


@dataclass(frozen=True, slots=True)
class Choice:
    """What one launch gives."""

    tokens: Tensor  # int32 [n] on the device, in order of its stream; -1: the row is not finite
    _readback: "_Readback"
    _counts: dict[int, int]  # of likely tokens to tell, of each row that asks for logprobs
    _width: int  # the greatest of them

    def result(self) -> list[Sampled]:
        """What each request gets; waits for the device."""
        numbers = self._readback.wait()
        count, asking = len(self.tokens), len(self._counts)
        tokens = [None if token < 0 else token for token in numbers[:count].tolist()]
        values = numbers[count : count + asking * (self._width + 1)].view(torch.float32)
        values = values.view(asking, self._width + 1)
        ids = numbers[count + values.numel() :].view(asking, self._width)
        told: list[TokenLogprobs | None] = [None] * count
        for place, (row, wanted) in enumerate(self._counts.items()):
            if tokens[row] is not None:
                own, *likely = values[place, : wanted + 1].tolist()
                told[row] = TokenLogprobs(own, list(zip(ids[place].tolist(), likely, strict=False)))
        return [Sampled(*pair) for pair in zip(tokens, told, strict=True)]


class _Readback:
    """int32 numbers [n] on their way to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._host = numbers
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._done = torch.cuda.current_stream(numbers.device).record_event()

    def wait(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._host


def _pack_logprobs(raw: Tensor, tokens: Tensor, asking: Sequence[int], width: int) -> Tensor:
    """As int32: values [len(asking), 1 + width], the token's own first; ids [len(asking), width]"""
    own = torch.stack([tokens[i] for i in asking]).clamp(min=0).long().unsqueeze(1)
    values, ids = raw.topk(width)
    values = torch.cat((raw.gather(1, own), values), dim=1)
    return torch.cat((values.view(torch.int32).flatten(), ids.int().flatten()))
