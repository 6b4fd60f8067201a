"""Who runs in this step and with how many tokens; the only writer of requests."""

from collections import deque
from collections.abc import Mapping, Sequence

from morphserve.configs.schema import SchedulerConfig
from morphserve.runtime.batch import Batch as Batch
from morphserve.runtime.batch import Slice as Slice
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.outcomes import Outcome, Outcomes
from morphserve.runtime.prefix_cache import Found
from morphserve.runtime.queue import Queue
from morphserve.runtime.request import FinishReason, Request, Status, needs_history
from morphserve.runtime.reuse import Reuse


class Scheduler:
    """First come, first served; decode before prefill; prompts in chunks; recompute when full.

    A request that may not run at a step's rung does not: it keeps its place in the queue, or, if it
    was running, its blocks.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        block_tokens: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        prefix_caching: bool = True,
    ) -> None:
        self._config = config
        self._pool = pool
        self._block_tokens = block_tokens
        self.reuse = Reuse(pool, block_tokens, prefix_caching)
        self._outcomes = Outcomes(self.reuse, eos_token_ids, max_model_len, end=self._end)
        self._queue = Queue()
        self._rung = 0  # of the latest step
        self._now_s = 0.0  # when it was scheduled
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0
        self.max_blocks: int | None = None  # that admission may fill; None: all there are
        self.memory_blocked = False  # requests wait for blocks, nothing else, that morphing gives

    @property
    def waiting(self) -> deque[Request]:
        """In line for room, the next one first."""
        return self._queue.line

    @property
    def held(self) -> list[Request]:
        """Waiting for a shallower rung."""
        return self._queue.held

    @property
    def num_held(self) -> int:
        """Requests, running ones included, that wait for a shallower rung."""
        return len(self.held) + sum(not r.runs_at(self._rung) for r in self.running)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold, shared ones once."""
        return self._pool.num_used

    @property
    def has_work(self) -> bool:
        """Whether some request may run at the latest rung."""
        return bool(self.waiting) or any(r.runs_at(self._rung) for r in self.running)

    def add(self, request: Request) -> None:
        self._queue.add(request)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request wherever it stands; None if it is not here any more."""
        request = next((r for r in (*self.running, *self._queue) if r.id == request_id), None)
        if request is not None:
            self._end(request, FinishReason.ABORT)
        return request

    def expire(self, now_s: float) -> list[Request]:
        """Ends the requests that have waited for too long without ever having run."""
        if self._config.queue_timeout_s is None:
            return []
        overdue = self._queue.came_before(now_s - self._config.queue_timeout_s)
        for request in overdue:
            self._end(request, FinishReason.TIMEOUT)
        return overdue

    def schedule(self, rung: int = 0, now_s: float = 0.0) -> Batch:
        """The batch of a step at this rung, empty when nothing can run. Blocks are taken here."""
        self._rung, self._now_s = rung, now_s
        self._queue.set_rung(rung)
        preemptions = self.num_preemptions
        batch = self._decodes()
        budget = self._config.max_num_batched_tokens - len(batch)
        if len(batch) < len(self.running):
            budget -= self._take_chunks(batch, budget)
        if self.num_preemptions == preemptions:  # else the preempted would come straight back
            budget -= self._take_new(batch, budget)
        while not batch and self.waiting and self.yield_paused():
            budget -= self._take_new(batch, budget)
        self.memory_blocked = (
            self._is_seat_free()
            and self._room_for(self.waiting[0]) is None
            and any(r.gains_below(rung) for r in self.waiting)
        )
        return batch

    def yield_paused(self) -> bool:
        """Takes the youngest paused request's blocks if no running one may run; whether it did."""
        if not self.running or any(r.runs_at(self._rung) for r in self.running):
            return False
        self._take_back(self.running[-1])
        return True

    def useful_rung(self, last: int) -> int:
        """The deepest rung, `last` at most, at which some request may run that wants blocks."""
        wanting = (r for r in (*self.running, *self.waiting) if r.gains_below(self._rung))
        return max((last if r.max_rung is None else r.max_rung for r in wanting), default=0)

    def must_know(self, rung: int) -> bool:
        """Whether a step at this rung has to wait for the tokens that are being computed.

        It has to where a token depends on them beyond what the model sees. And where somebody
        would lose blocks, or is not to run any more: what ends may leave room for all, and nothing
        is taken from a request while a token of it is unknown.
        """
        growth = 0
        for request in self.running:
            if not request.runs_at(rung):
                if request.runs_at(self._rung):
                    return True
            elif not request.is_ending and request.num_tokens - request.num_computed == 1:
                if request.is_pending and needs_history(request.params):
                    return True
                growth += self._blocks_for(request.num_tokens) > len(request.blocks)
        return growth > self._pool.num_free

    def launched(self, batch: Batch) -> None:
        """Notes that a step is being computed, and that the one before it was computed.

        So each request has one unknown token at most, its newest. Those that have ended since the
        batch was made are passed over.
        """
        self._outcomes.launched(batch, self._rung)

    def computed(self, batch: Batch, tokens: Sequence[int | None]) -> list[Outcome]:
        """Notes what a step computed for requests that have not ended since it was launched.

        `tokens` are those of the sampling slices, in batch order. None in place of a token ends
        the request with an error. Returns the requests that went on or ended, with their new
        tokens.
        """
        return self._outcomes.computed(batch, tokens)

    def update(self, batch: Batch, tokens: Sequence[int | None]) -> list[Outcome]:
        """Both at once, for a step that was computed as it was launched."""
        self.launched(batch)
        return self.computed(batch, tokens)

    def fail(self, batch: Batch) -> list[Request]:
        """Ends the requests of a batch whose step failed."""
        for piece in batch:
            self._end(piece.request, FinishReason.ERROR)
        return [piece.request for piece in batch]

    def move_blocks(self, moves: Mapping[int, int]) -> None:
        """Rewrites the block tables after blocks were copied elsewhere."""
        if moves:
            for request in self.running:
                request.blocks = [moves.get(block, block) for block in request.blocks]

    def demand(self, horizon: int) -> int:
        """Blocks that requests want, each up to `horizon` more output tokens.

        A block that several of them share counts once. Waiting requests count as far as
        `max_num_seqs` lets them run. Those that a deeper rung would only hold up do not count.
        """
        room = self._config.max_num_seqs - len(self.running)
        running = [r for r in self.running if r.gains_below(self._rung)]
        first = [r for r, _ in zip(self.waiting, range(room), strict=False)]
        waiting = [r for r in first if r.gains_below(self._rung)]
        wanted = sum(self._blocks_for(r.tokens_within(horizon)) for r in (*running, *waiting))
        found = [b for r in waiting for b in self.reuse.find(r, self._rung).blocks]
        idle = {block for block in found if not self._pool.is_used(block)}
        return wanted - self._num_shared(running) - (len(found) - len(idle))

    def _num_shared(self, requests: Sequence[Request]) -> int:
        """Blocks that sharing saves among these running requests."""
        if len(requests) == len(self.running):
            return self._pool.num_shared
        tables = [request.blocks for request in requests]
        return sum(map(len, tables)) - len(set().union(*tables))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def _decodes(self) -> Batch:
        """A slice of one token for each request that goes on from its latest one."""
        batch: Batch = []
        preemptions = self.num_preemptions
        for request in list(self.running):
            end = request.num_tokens
            decodes = end - request.num_computed == 1 and not request.is_ending
            if decodes and self._grow(request, end):
                batch.append(self._slice(request, end - 1, end))
        if self.num_preemptions == preemptions:
            return batch
        return [s for s in batch if s.request.status is Status.RUNNING]  # not preempted since

    def _take_chunks(self, batch: Batch, budget: int) -> int:
        """Goes on with prompts of requests that run already; returns the tokens taken."""
        taken = 0
        for request in self.running:
            more = request.num_tokens - request.num_computed > 1 and request.runs_at(self._rung)
            if more and taken < budget:
                taken += self._take_chunk(batch, request, budget - taken)
        return taken

    def _grow(self, request: Request, end: int) -> bool:
        """Makes room for the request's tokens up to `end`, preempting the youngest if need be."""
        if request.status is not Status.RUNNING or not request.runs_at(self._rung):
            return False
        needed = self._blocks_for(end) - len(request.blocks)
        if needed <= 0:
            return True
        while needed > self._pool.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        request.blocks += self._pool.allocate(needed)
        return True

    def _take_chunk(self, batch: Batch, request: Request, budget: int) -> int:
        start = request.num_computed
        end = min(request.num_tokens, start + budget)
        batch.append(self._slice(request, start, end))
        return end - start

    def _slice(self, request: Request, start: int, end: int) -> Slice:
        written = request.blocks[start // self._block_tokens : self._blocks_for(end)]
        assert self._pool.are_writable(written), "a shared block would be written"
        return Slice(request, start, end)

    def _take_new(self, batch: Batch, budget: int) -> int:
        """Admits requests as long as they find room and tokens of the step; returns the tokens."""
        taken = 0
        while taken < budget and (admitted := self._admit()):
            taken += self._take_chunk(batch, admitted, budget - taken)
        return taken

    def _admit(self) -> Request | None:
        """Moves the oldest waiting request to the running ones if all its tokens find room."""
        if not self._is_seat_free() or (found := self._room_for(self.waiting[0])) is None:
            return None
        request = self.waiting.popleft()
        self.reuse.take(request, found)
        missing = self._blocks_for(request.num_tokens + 1) - len(request.blocks)
        request.blocks += self._pool.allocate(missing)
        request.status = Status.RUNNING
        if request.scheduled_s is None:
            request.scheduled_s = self._now_s
        self.running.append(request)
        return request

    def _is_seat_free(self) -> bool:
        """Whether a request waits that only memory may keep from running."""
        return bool(self.waiting) and len(self.running) < self._config.max_num_seqs

    def _room_for(self, request: Request) -> Found | None:
        """What is cached of the request, if the pool has its other blocks too.

        And one more for each running request to grow into.
        """
        room = self._pool.num_free
        if self.max_blocks is not None:
            room = min(room, self.max_blocks - self._pool.num_used)
        wanted = self._blocks_for(request.num_tokens + 1)
        if wanted - (request.num_tokens - 1) // self._block_tokens + len(self.running) > room:
            return None  # even if all of it were cached, which takes a while to find out
        found = self.reuse.find(request, self._rung)
        idle = sum(not self._pool.is_used(block) for block in found.blocks)
        new = wanted - len(found.blocks)
        return found if new + idle + len(self.running) <= room else None

    def _preempt(self, request: Request) -> None:
        """Takes a request's blocks away as memory lacks."""
        self._take_back(request)
        self.num_preemptions += 1

    def _take_back(self, request: Request) -> None:
        """Takes a request's blocks away; it waits first in line and is computed again."""
        assert not request.is_pending, "a token is lost"
        self.running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        request.num_preemptions += 1
        self._queue.put_back(request)

    def _release(self, request: Request) -> None:
        self._pool.free(request.blocks)
        request.blocks = []
        request.num_computed = request.num_registered = 0

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            self._queue.remove(request)
        if reason is FinishReason.ERROR:
            self._pool.forget(request.blocks)  # what they hold may be what was wrong
        if request.is_pending:
            request.output.pop()
        self._release(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
