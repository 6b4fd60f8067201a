"""What a request changes about its logits before they become probabilities: bias and penalties."""

import torch
from torch import Tensor

from morphserve.runtime.request import Request, SamplingParams, Status


def changes_logits(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
    )


class Adjustments:
    """Of all requests that ask for some; what they have seen is kept from step to step."""

    def __init__(self) -> None:
        self._histories: dict[Request, _History] = {}

    def __len__(self) -> int:
        """Requests remembered."""
        return len(self._histories)

    def apply(self, row: Tensor, request: Request) -> None:
        """Changes a request's row of logits [vocab] in place: first the bias, then penalties."""
        history = self._histories.get(request)
        if history is None:
            history = self._histories[request] = _History(request, row.device)
        history.apply(row)

    def drop_finished(self) -> None:
        for request in [r for r in self._histories if r.status is Status.FINISHED]:
            del self._histories[request]


class _History:
    """The tokens one request has seen, each once, with how often its output holds them.

    Grows by what the output has gained since the last step, so that a step costs the same however
    long the output is, and preemption, which keeps the output, changes nothing.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        self._request = request
        self._device = device
        bias = request.params.logit_bias
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        prompt = request.prompt if request.params.repetition_penalty != 1 else []
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids = torch.tensor(list(self._places), dtype=torch.int64)
        self._counts = torch.zeros(len(self._places))  # in the output
        self._num_noted = 0  # output tokens that are counted

    def apply(self, row: Tensor) -> None:
        row[self._bias_ids] += self._bias
        self._note()
        params = self._request.params
        ids = self._ids[: len(self._places)].to(self._device)
        counts = self._counts[: len(self._places)].to(self._device)
        seen, strength = row[ids], params.repetition_penalty
        seen = torch.where(seen > 0, seen / strength, seen * strength)
        seen -= params.frequency_penalty * counts
        seen -= params.presence_penalty * (counts > 0)
        row[ids] = seen

    def _note(self) -> None:
        output = self._request.output
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
