"""What a request changes about its logits before they become probabilities.

Its bias, then penalties; then min_tokens, before which nothing may end the output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from morphserve.runtime.request import Request, SamplingParams, Status, needs_history
from morphserve.runtime.uploads import on_device

LOWEST = torch.finfo(torch.float32).min  # never the greatest, yet finite


def changes_logits(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or needs_history(params)


class Adjustments:
    """Of all requests that ask for some; what they have seen is kept from step to step."""

    def __init__(self, eos_token_ids: Sequence[int] = ()) -> None:
        self._eos = eos_token_ids
        self._histories: dict[Request, _History] = {}

    def __len__(self) -> int:
        """Requests remembered."""
        return len(self._histories)

    def concern(self, request: Request) -> bool:
        """Whether the logits of its next token are changed."""
        params = request.params
        return changes_logits(params) or len(request.output) < params.min_tokens

    def adjust(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """Changes each request's row of float32 logits [len(requests), vocab] in place."""
        self.drop_finished()
        for i, request in enumerate(requests):
            if self.concern(request):
                self.apply(logits[i], request)

    def apply(self, row: Tensor, request: Request) -> None:
        """Changes a request's row of logits [vocab] in place."""
        history = self._histories.get(request)
        if history is None:
            history = self._histories[request] = _History(request, self._eos, row.device)
        history.apply(row)

    def drop_finished(self) -> None:
        for request in [r for r in self._histories if r.status is Status.FINISHED]:
            del self._histories[request]


class _History:
    """The tokens one request has seen, each once, with how often its output holds them.

    Grows by what the output has gained since the last step, so that a step costs the same however
    long the output is, and preemption, which keeps the output, changes nothing.
    """

    def __init__(self, request: Request, eos: Sequence[int], device: torch.device) -> None:
        params = request.params
        self._request = request
        self._device = device
        bias = params.logit_bias
        self._bias_ids = on_device(torch.tensor(list(bias), dtype=torch.int64), device)
        self._bias = on_device(torch.tensor(list(bias.values()), dtype=torch.float32), device)
        endings = [*params.stop_token_ids, *(() if params.ignore_eos else eos)]
        self._endings = on_device(torch.tensor(endings, dtype=torch.int64), device)
        prompt = request.prompt if params.repetition_penalty != 1 else []
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids = torch.tensor(list(self._places), dtype=torch.int64)
        self._counts = torch.zeros(len(self._places))  # in the output
        self._num_noted = 0  # output tokens that are counted

    def apply(self, row: Tensor) -> None:
        params, output = self._request.params, self._request.output
        if params.logit_bias:
            row[self._bias_ids] += self._bias
        if needs_history(params):
            self._note()
            self._penalise(row)
        if len(output) < params.min_tokens:
            row[self._endings] += LOWEST  # what is not finite stays so

    def _penalise(self, row: Tensor) -> None:
        params = self._request.params
        ids = on_device(self._ids[: len(self._places)], self._device)
        counts = on_device(self._counts[: len(self._places)], self._device)
        seen, strength = row[ids], params.repetition_penalty
        seen = torch.where(seen > 0, seen / strength, seen * strength)
        seen -= params.frequency_penalty * counts
        seen -= params.presence_penalty * (counts > 0)
        row[ids] = seen

    def _note(self) -> None:
        output = self._request.output
        assert not output or output[-1] >= 0  # every token is known
        for token in output[self._num_noted :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._widen()
            self._ids[place] = token
            self._counts[place] += 1
        self._num_noted = len(output)

    def _widen(self) -> None:
        more = max(64, len(self._ids))
        self._ids = torch.cat((self._ids, torch.zeros(more, dtype=torch.int64)))
        self._counts = torch.cat((self._counts, torch.zeros(more)))
