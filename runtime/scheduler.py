"""Who runs in this step and with how many tokens; the only writer of requests."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from morphserve.configs.schema import SchedulerConfig
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.request import FinishReason, Request, Status


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens start..end of one request in this step."""

    request: Request
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether this slice reaches the request's last token, so that a new one follows."""
        return self.end == self.request.num_tokens


Batch = list[Slice]


class Scheduler:
    """First come, first served; decode before prefill; prompts in chunks; recompute when full."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        block_tokens: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._config = config
        self._pool = pool
        self._block_tokens = block_tokens
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0
        self.memory_blocked = False  # the oldest waiting request waits for blocks, nothing else

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request wherever it stands; None if it is not here any more."""
        request = next((r for r in self._all() if r.id == request_id), None)
        if request is not None:
            self._end(request, FinishReason.ABORT)
        return request

    def schedule(self) -> Batch:
        """The next step's batch, empty when nothing can run. Blocks are taken here."""
        budget = self._config.max_num_batched_tokens
        batch: Batch = []
        preemptions = self.num_preemptions
        for request in list(self.running):
            if request.num_tokens - request.num_computed == 1 and self._grow(request):
                batch.append(Slice(request, request.num_computed, request.num_tokens))
        batch = [
            s for s in batch if s.request.status is Status.RUNNING
        ]  # preempted for a later one
        budget -= len(batch)
        for request in self.running:
            if request.num_tokens - request.num_computed > 1 and budget > 0:
                budget -= self._take_chunk(batch, request, budget)
        if self.num_preemptions == preemptions:  # else the preempted would come straight back
            while budget > 0 and (admitted := self._admit()):
                budget -= self._take_chunk(batch, admitted, budget)
        self.memory_blocked = self._is_seat_free() and not self._fits(self.waiting[0])
        return batch

    def update(self, batch: Batch, tokens: Sequence[int | None]) -> list[tuple[Request, list[int]]]:
        """Notes what a step computed; `tokens` are those of the sampling slices, in batch order.

        None in place of a token ends the request with an error. Returns the requests that went
        on or ended, with their new tokens.
        """
        new = iter(tokens)
        outputs: list[tuple[Request, list[int]]] = []
        for piece in batch:
            request, samples = piece.request, piece.samples
            request.num_computed = piece.end
            if samples:
                outputs.append((request, self._append(request, next(new))))
        return outputs

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

        Waiting requests count as far as `max_num_seqs` lets them run.
        """
        room = self._config.max_num_seqs - len(self.running)
        wanted = self.running + [r for r, _ in zip(self.waiting, range(room), strict=False)]
        return sum(self._blocks_for(self._tokens_ahead(r, horizon)) for r in wanted)

    def _all(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def _tokens_ahead(self, request: Request, horizon: int) -> int:
        return min(request.num_tokens + horizon, request.max_tokens)

    def _grow(self, request: Request) -> bool:
        """Makes room for the request's next token, preempting the youngest if need be."""
        if request.status is not Status.RUNNING:
            return False
        needed = self._blocks_for(request.num_tokens) - len(request.blocks)
        while needed > self._pool.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        request.blocks += self._pool.allocate(needed)
        return True

    def _take_chunk(self, batch: Batch, request: Request, budget: int) -> int:
        count = min(request.num_tokens - request.num_computed, budget)
        batch.append(Slice(request, request.num_computed, request.num_computed + count))
        return count

    def _admit(self) -> Request | None:
        """Moves the oldest waiting request to the running ones if all its tokens find room."""
        if not self._is_seat_free() or not self._fits(self.waiting[0]):
            return None
        request = self.waiting.popleft()
        request.blocks = self._pool.allocate(self._blocks_for(request.num_tokens + 1))
        request.status = Status.RUNNING
        if request.scheduled_s is None:
            request.scheduled_s = time.monotonic()
        self.running.append(request)
        return request

    def _is_seat_free(self) -> bool:
        """Whether a request waits that only memory may keep from running."""
        return bool(self.waiting) and len(self.running) < self._config.max_num_seqs

    def _fits(self, request: Request) -> bool:
        """Whether the pool has its blocks and one more for each running request to grow into."""
        needed = self._blocks_for(request.num_tokens + 1) + len(self.running)
        return needed <= self._pool.num_free

    def _preempt(self, request: Request) -> None:
        """Takes a request's blocks away; it waits first in line and is computed again."""
        self.running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _append(self, request: Request, token: int | None) -> list[int]:
        if token is None:
            self._end(request, FinishReason.ERROR)
            return []
        request.output.append(token)
        if reason := self._finish_reason(request):
            self._end(request, reason)
        return [token]

    def _release(self, request: Request) -> None:
        self._pool.free(request.blocks)
        request.blocks = []
        request.num_computed = 0

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)
        request.status = Status.FINISHED
        request.finish_reason = reason

    def _finish_reason(self, request: Request) -> FinishReason | None:
        params = request.params
        token, count = request.output[-1], len(request.output)
        if count >= params.min_tokens:
            if token in params.stop_token_ids:
                return FinishReason.STOP
            if token in self._eos and not params.ignore_eos:
                return FinishReason.STOP
        if count >= params.max_tokens or request.num_tokens >= self._max_model_len:
            return FinishReason.LENGTH
        return None
