"""How many requests may be in flight, and what those that may not are told."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from morphserve.runtime.server.errors import ApiError, bad_request, whole_seconds
from morphserve.runtime.windows import Rolling

QUEUED_CACHES = 8  # prompt tokens that may wait, in KV caches of the deepest allowed rung
_RATE_WINDOW_S = 10.0


@dataclass(slots=True, eq=False)
class Ticket:
    """What one API call takes of the queue. Nothing of it outlives the call."""

    num_prompts: int = 1  # more once its body has been read
    unstarted: dict[int, int] = field(default_factory=dict)  # choice -> tokens of its prompt

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of choices without a first token."""
        return sum(self.unstarted.values())


class Admission:
    """Counts what is in flight, and refuses what is too much.

    A request is counted before its body is read and its prompt before it is sent to the engine,
    each in one go with the look at the limit: no two requests can take the same place.
    """

    def __init__(
        self,
        max_requests: int,
        max_queued_tokens: int,
        status: int = 503,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_requests`: prompts running and queued; `status`: of what is too much, 503 or 429."""
        self.max_requests = max_requests
        self.max_queued_tokens = max_queued_tokens
        self.num_calls = 0  # not yet answered to the end
        self.num_prompts = 0  # of these calls
        self.queued_tokens = 0  # prompt tokens in flight, of prompts without a first token
        self.refused: Counter[str] = Counter()  # by reason
        self._status = status
        self._clock = clock
        self._started = Rolling(_RATE_WINDOW_S)  # prompt tokens

    def enter(self) -> Ticket:
        """Takes a place for an API call. Raises ApiError if there is none."""
        if self.num_prompts >= self.max_requests:
            raise self._full()
        self.num_calls += 1
        self.num_prompts += 1
        return Ticket()

    def widen(self, ticket: Ticket, num_prompts: int) -> None:
        """Takes a place for each prompt of a call. Raises ApiError if so many do not fit."""
        if num_prompts > self.max_requests:
            raise bad_request(f"this server takes at most {self.max_requests} prompts", "prompt")
        more = num_prompts - ticket.num_prompts
        if self.num_prompts + more > self.max_requests:
            raise self._full()
        self.num_prompts += more
        ticket.num_prompts = num_prompts

    def queue(self, ticket: Ticket, prompts: list[int]) -> None:
        """Counts prompts of so many tokens as queued. Raises ApiError if they are too much.

        Whatever fits a request alone is taken by an idle server.
        """
        wanted = sum(prompts)
        if self.queued_tokens and self.queued_tokens + wanted > self.max_queued_tokens:
            raise self.refusal(
                "queued_tokens",
                f"the queue is full: {self.queued_tokens} of {self.max_queued_tokens} prompt "
                f"tokens are waiting, and this request has {wanted}",
            )
        ticket.unstarted = dict(enumerate(prompts))
        self.queued_tokens += wanted

    def started(self, ticket: Ticket, choice: int) -> None:
        """A choice has its first token; may be told again."""
        if tokens := ticket.unstarted.pop(choice, 0):
            self.queued_tokens -= tokens
            self._started.add(self._clock(), tokens)

    def leave(self, ticket: Ticket) -> None:
        """The call has been answered to the end."""
        self.num_calls -= 1
        self.num_prompts -= ticket.num_prompts
        self.queued_tokens -= ticket.num_tokens

    def refusal(self, reason: str, message: str) -> ApiError:
        """The answer to a request that is too much; counts it."""
        return self.unavailable(reason, message, self._backlog_s(), self._status)

    def unavailable(
        self, reason: str, message: str, retry_after_s: float, status: int = 503
    ) -> ApiError:
        """The answer to a request that nobody can serve now; counts it."""
        self.refused[reason] += 1
        return ApiError(status, message, headers={"Retry-After": whole_seconds(retry_after_s)})

    def _full(self) -> ApiError:
        return self.refusal(
            "queue_full",
            f"the queue is full: {self.num_prompts} of {self.max_requests} prompts are in flight",
        )

    def _backlog_s(self) -> float:
        """Time that the queued tokens take at the recent rate of prompts; 1 s if there is none."""
        rate = self._started.per_second(self._clock())
        return self.queued_tokens / rate if rate else 1.0
