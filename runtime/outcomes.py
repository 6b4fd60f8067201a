"""What steps bring to their requests: first a place for a token, then the token."""

from collections.abc import Callable, Sequence

from morphserve.runtime.batch import Batch
from morphserve.runtime.request import PENDING, FinishReason, Request, Status, end_of
from morphserve.runtime.reuse import Reuse

Outcome = tuple[Request, list[int]]  # a request that went on or ended, with its new tokens


class Outcomes:
    """The scheduler's hand in requests whose tokens are computed."""

    def __init__(
        self,
        reuse: Reuse,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        end: Callable[[Request, FinishReason], None],
    ) -> None:
        self._reuse = reuse
        self._eos = frozenset(eos_token_ids)
        self._max_model_len = max_model_len
        self._end = end

    def launched(self, batch: Batch, rung: int) -> None:
        """Notes that a step at this rung is being computed, for requests that have not ended.

        Where the token to come is the last one by length, that is known from here on.
        """
        for piece in batch:
            request = piece.request
            if request.status is Status.FINISHED:
                continue
            request.num_computed = piece.end
            if request.kv_rung < rung:
                request.kv_rung = rung
            if piece.samples:
                output, num_tokens = request.output, piece.end + 1
                output.append(PENDING)
                if len(output) >= request.params.max_tokens or num_tokens >= self._max_model_len:
                    request.is_ending = True

    def computed(self, batch: Batch, tokens: Sequence[int | None]) -> list[Outcome]:
        """Puts tokens, None for none, in the places of the sampling slices; ends requests.

        Their full blocks can be found by others from here on. What the step after this one writes,
        for a request that ends here, lies behind them.
        """
        new = iter(tokens)
        outcomes: list[Outcome] = []
        for piece in batch:
            request, samples = piece.request, piece.samples
            token = next(new) if samples else None
            if token is not None or not samples:
                self._reuse.leave(request)
            if samples:
                outcomes.append((request, self._place(request, token)))
        return outcomes

    def _place(self, request: Request, token: int | None) -> list[int]:
        if token is None:
            self._end(request, FinishReason.ERROR)
            return []
        request.output[-1] = token
        if reason := end_of(request, self._eos):
            self._end(request, reason)
        return [token]
