"""The scheduler that serves, with steps that cost the same however many requests decode."""

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from morphserve.configs.schema import SchedulerConfig
from morphserve.morphcli.simulate.pool import CountingPool
from morphserve.runtime.costs import Span
from morphserve.runtime.request import FinishReason, Request
from morphserve.runtime.scheduler import Scheduler

_Decoding = tuple[int, int, Request]  # (pace of its last step, order of joining, request)


@dataclass(slots=True)
class CountedBatch:
    """What one counted step computes and brings."""

    decodes: int  # slices of one token
    context: int  # tokens that these look at, themselves included
    prefills: list[Span]
    sampled: int  # tokens generated
    joined: list[Request]  # whose prompt is complete: they have a new token
    ended: list[Request]


class CountedScheduler(Scheduler):
    """Makes the same decisions in two ways: request by request, or on counts.

    While it counts, requests that decode stand still: `pace` steps on, and each has as many more
    tokens as steps have passed since it joined. `settle` brings them up to date, for the steps that
    counts cannot tell: those that preempt, and the looks of the controller.
    """

    def __init__(
        self, config: SchedulerConfig, pool: CountingPool, block_tokens: int, max_model_len: int
    ) -> None:
        super().__init__(config, pool, block_tokens, max_model_len, (), prefix_caching=False)
        self._counts = pool
        self._is_counting = False
        self._pace = 0  # steps counted
        self._marks: dict[str, int] = {}  # the pace up to which a decoding request is up to date
        self._ends: list[_Decoding] = []  # heap
        self._crossings = [0] * block_tokens  # decoding requests that want a block, by pace
        self._in_advance: dict[int, int] = {}  # of these, those that hold it already, by exact pace
        self._tickets = count()
        self._prefilling: deque[Request] = deque()
        self._context = 0  # tokens that a step of all decoding requests looks at

    @property
    def has_work(self) -> bool:
        """Nobody here waits for a shallower rung."""
        return bool(self.running or self._queue.line)

    def start_counting(self) -> None:
        """Takes requests as they are into counts."""
        if self._is_counting:
            return
        self._is_counting = True
        self._marks.clear()
        self._ends.clear()
        self._in_advance.clear()
        self._crossings = [0] * self._block_tokens
        self._context = 0
        self._prefilling = deque()
        for request in self.running:
            if request.output and request.num_tokens - request.num_computed == 1:
                self._follow(request, self._pace + 1)
            else:
                self._prefilling.append(request)

    def settle(self) -> None:
        """Brings every request up to date."""
        if not self._is_counting:
            return
        self._is_counting = False
        for _, _, request in self._ends:
            self._catch_up(request)

    def quiet_steps(self) -> int:
        """Counted steps to come in each of which decoding requests gain a token, and no more."""
        if self._prefilling or not self._ends or self._may_admit():
            return 0
        steps = self._ends[0][0] - self._pace - 1
        while steps > 1 and not self._has_room_for(steps):
            steps //= 2
        return steps if self._has_room_for(steps) else 0

    def _has_room_for(self, steps: int) -> bool:
        most, free = len(self._ends) * (1 + steps // self._block_tokens), self._counts.num_free
        return most <= free or self._growth(steps) <= free

    @property
    def decoding(self) -> tuple[int, int]:
        """(requests that decode, tokens that their next step looks at), while it counts"""
        return len(self._ends), self._context

    @property
    def queued_tokens(self) -> int:
        """Of prompts that are still to be computed, while it counts."""
        waiting = sum(request.num_tokens for request in self.waiting)
        return waiting + sum(r.num_tokens - r.num_computed for r in self._prefilling)

    def skip(self, steps: int) -> None:
        """Does so many quiet steps."""
        self._counts.take(self._growth(steps))
        self._pass(steps)

    def count_step(self, now_s: float) -> CountedBatch | None:
        """A step of whatever runs; None, and nothing happens, if it has to preempt."""
        growth = self._growth(1)
        if growth > self._counts.num_free:
            return None
        self._now_s = now_s
        self._counts.take(growth)
        batch = CountedBatch(len(self._ends), self._context, [], len(self._ends), [], [])
        self._pass(1)
        budget = self._config.max_num_batched_tokens - batch.decodes
        budget -= self._last_tokens(batch)
        self._take_counted(batch, budget)
        self.memory_blocked = self._is_seat_free() and self._room_for(self.waiting[0]) is None
        self._join(batch)
        self._end_due(batch)
        return batch

    def _pass(self, steps: int) -> None:
        self._pace += steps
        self._context += steps * len(self._ends)
        if self._in_advance:
            self._in_advance = {p: n for p, n in self._in_advance.items() if p > self._pace}

    def _growth(self, steps: int) -> int:
        """Blocks that decoding requests take in so many steps."""
        size, crossings = self._block_tokens, self._crossings
        rounds, rest = divmod(steps, size)
        first = (self._pace + 1) % size
        grown = rounds * len(self._ends)
        if rest:
            grown += sum(crossings[first : first + rest])
            grown += sum(crossings[: max(0, first + rest - size)])
        if self._in_advance:
            last = self._pace + steps
            grown -= sum(n for pace, n in self._in_advance.items() if self._pace < pace <= last)
        return grown

    def _last_tokens(self, batch: CountedBatch) -> int:
        """Prompts of which one token is missing count as decodes, as in a step of requests."""
        last = [r for r in self._prefilling if r.num_tokens - r.num_computed == 1]
        for request in last:
            self._prefilling.remove(request)
            self._take_span(batch, request, 1)
        return len(last)

    def _take_counted(self, batch: CountedBatch, budget: int) -> None:
        """Prompts that run already, then new ones, as far as the step's tokens go."""
        while self._prefilling and budget > 0:
            request = self._prefilling.popleft()
            budget -= self._take_span(batch, request, budget)
        while budget > 0 and (admitted := self._admit()):
            budget -= self._take_span(batch, admitted, budget)

    def _take_span(self, batch: CountedBatch, request: Request, budget: int) -> int:
        start, tokens = request.num_computed, request.num_tokens
        taken = min(tokens - start, budget)
        request.num_computed = start + taken
        if taken == 1:
            batch.decodes += 1
            batch.context += start + 1
        else:
            batch.prefills.append((start, start + taken))
        if request.num_computed == tokens:
            batch.joined.append(request)
            batch.sampled += 1
        else:
            self._prefilling.appendleft(request)
        return taken

    def _join(self, batch: CountedBatch) -> None:
        for request in batch.joined:
            request.output.append(0)
            if len(request.output) >= request.params.max_tokens:
                batch.ended.append(request)
                self._end(request, FinishReason.LENGTH)
            else:
                self._follow(request, self._pace + 1)

    def _follow(self, request: Request, next_pace: int) -> None:
        """Counts a request that decodes from the step `next_pace` on."""
        tokens = request.num_tokens
        left = request.params.max_tokens - len(request.output)
        self._marks[request.id] = next_pace - 1
        heappush(self._ends, (next_pace - 1 + left, next(self._tickets), request))
        crossing = self._crossing(tokens, next_pace)
        self._crossings[crossing % self._block_tokens] += 1
        if self._is_held(request, crossing - next_pace):
            self._in_advance[crossing] = self._in_advance.get(crossing, 0) + 1
        self._context += tokens

    def _crossing(self, tokens: int, next_pace: int) -> int:
        """The step that first wants a block more for a request that goes on with so many tokens."""
        return next_pace + (1 - tokens) % self._block_tokens

    def _is_held(self, request: Request, steps: int) -> bool:
        """Whether it has the block that it comes to want so many steps after its next one."""
        return len(request.blocks) >= self._blocks_for(request.num_tokens + steps)

    def _end_due(self, batch: CountedBatch) -> None:
        while self._ends and self._ends[0][0] <= self._pace:
            request = heappop(self._ends)[2]
            self._forget(request)
            batch.ended.append(request)
            self._end(request, FinishReason.LENGTH)

    def _forget(self, request: Request) -> None:
        """Counts a decoding request no longer."""
        next_pace = self._marks[request.id] + 1
        crossing = self._crossing(request.num_tokens, next_pace)
        self._crossings[crossing % self._block_tokens] -= 1
        if crossing > self._pace and self._is_held(request, crossing - next_pace):
            self._in_advance[crossing] -= 1
        self._catch_up(request)
        self._context -= request.num_tokens
        del self._marks[request.id]

    def _catch_up(self, request: Request) -> None:
        steps = self._pace - self._marks[request.id]
        if steps:
            self._marks[request.id] = self._pace
            request.output += [0] * steps
            request.num_computed += steps
            missing = self._blocks_for(request.num_computed) - len(request.blocks)
            request.blocks += [0] * missing

    def _may_admit(self) -> bool:
        return self._is_seat_free() and self._room_for(self.waiting[0]) is not None

    def abort(self, request_id: str) -> Request | None:
        self.settle()
        return super().abort(request_id)
