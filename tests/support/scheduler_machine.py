"""Scheduler, queue, pool and prefix cache as one state machine, against a model of plain dicts."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from morphserve.configs.schema import SchedulerConfig
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.request import (
    PENDING,
    Demands,
    FinishReason,
    Request,
    SamplingParams,
    Status,
)
from morphserve.runtime.scheduler import Batch, Scheduler, Slice

BLOCK = 4
BASE = 11
REGIONS = {layer: tuple(range(100 * (layer + 1), 100 * (layer + 1) + 4)) for layer in range(3)}
TIMEOUT_S = 40.0


def greedy(tokens: list[int]) -> int:
    """The model: the same beginning always goes on the same way."""
    return 10 + sum(tokens) % 7


class Machine(RuleBasedStateMachine):
    """Each place in a block holds a token, its request's salt, and what rung it was computed at.

    That is the deepest of all rungs that had a part in it.
    """

    eos: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(range(BASE))
        config = SchedulerConfig(4, 16, max_model_len=40, queue_timeout_s=TIMEOUT_S)
        self.scheduler = Scheduler(config, self.pool, BLOCK, 40, self.eos)
        self.requests: list[Request] = []
        self.ends: Counter[str] = Counter()
        self.content: dict[tuple[int, int], tuple[int, str, int]] = {}
        self.open: set[int] = set()
        self.rung = 0
        self.now_s = 0.0

    @rule(
        seed=st.integers(0, 2),
        length=st.integers(1, 24),
        max_tokens=st.integers(1, 14),
        salt=st.sampled_from(["", "", "theirs"]),
        max_rung=st.sampled_from([None, None, 0, 1]),
    )
    def submit(
        self, seed: int, length: int, max_tokens: int, salt: str, max_rung: int | None
    ) -> None:
        self._submit(seed, length, max_tokens, Demands(cache_salt=salt), max_rung)

    @rule(count=st.integers(3, 6))
    def pressure(self, count: int) -> None:
        for i in range(count):
            self._submit(i % 2, 17, 16, Demands(), None)

    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            batch = self._schedule()
            self._update(batch, [self._token(piece) for piece in batch if piece.samples])

    @rule(data=st.data())
    def step_in_which_one_fails(self, data: st.DataObject) -> None:
        batch = self._schedule()
        if batch:
            self._fail(batch, data.draw(st.integers(0, len(batch) - 1)))

    @rule()
    def step_without_sound_logits(self) -> None:
        batch = self._schedule()
        self._update(batch, [None for piece in batch if piece.samples])

    @precondition(lambda self: self._active())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([request.id for request in self._active()]))
        assert self.scheduler.abort(name) is not None
        self.ends[name] += 1

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds
        for request in self.scheduler.expire(self.now_s):
            assert request.finish_reason is FinishReason.TIMEOUT
            assert self.now_s - request.arrival_s > TIMEOUT_S
            assert not request.num_preemptions and not request.output
            self.ends[request.id] += 1

    @rule(rung=st.integers(0, 3))
    def change_rung(self, rung: int) -> None:
        self.rung = rung

    @rule(layer=st.sampled_from(sorted(REGIONS)))
    def grow_or_shrink(self, layer: int) -> None:
        if layer not in self.open:
            self.pool.publish(layer, REGIONS[layer])
            self.open.add(layer)
        elif (moves := self.pool.evacuate(layer)) is not None:
            held = {block for request in self.scheduler.running for block in request.blocks}
            assert set(moves) == held & set(REGIONS[layer])
            self.open.remove(layer)
            for old, new in moves.items():
                for slot in range(BLOCK):
                    if (old, slot) in self.content:
                        self.content[new, slot] = self.content.pop((old, slot))
            self.content = {
                key: kept for key, kept in self.content.items() if key[0] not in REGIONS[layer]
            }
            self.scheduler.move_blocks(moves)

    @invariant()
    def every_block_is_held_by_whom_the_tables_say_or_idle_or_empty(self) -> None:
        self.pool.check([request.blocks for request in self.scheduler.running])
        assert self.pool.capacity == BASE + sum(len(REGIONS[layer]) for layer in self.open)

    @invariant()
    def tables_are_as_long_as_their_tokens_need(self) -> None:
        for request in self.requests:
            if request.status is not Status.RUNNING:
                assert not request.blocks
                continue
            needed = -(-request.num_tokens // BLOCK)
            assert needed - 1 <= len(request.blocks) <= needed + 1
            assert len(request.blocks) * BLOCK >= request.num_computed

    @invariant()
    def computed_tokens_are_still_there_at_no_deeper_rung_than_is_known(self) -> None:
        for request in self.scheduler.running:
            for place, token in enumerate(request.tokens(0, request.num_computed)):
                kept, salt, rung = self.content[self._slot(request, place)]
                assert (kept, salt) == (token, request.demands.cache_salt)
                assert rung <= request.kv_rung

    @invariant()
    def every_request_is_in_one_place_and_ends_once(self) -> None:
        scheduler = self.scheduler
        places = [*scheduler.running, *scheduler.waiting, *scheduler.held]
        assert Counter(r.id for r in places) == Counter(r.id for r in self._active())
        finished = {r.id for r in self.requests if r.status is Status.FINISHED}
        assert self.ends == dict.fromkeys(finished, 1)

    @invariant()
    def those_who_ran_before_are_first_in_line(self) -> None:
        for queue in (self.scheduler.waiting, self.scheduler.held):
            fresh = [not request.num_preemptions for request in queue]
            assert fresh == sorted(fresh)

    def teardown(self) -> None:
        """Back at full precision everything that is left is served, and all blocks are free."""
        self.rung = 0
        for _ in range(40 * len(self.requests)):  # as if one after the other, twice over
            if not self._active():
                break
            self.step(1)
        assert not self._active() and not self.scheduler.running
        assert self.pool.num_used == self.pool.num_shared == 0
        for request in self.requests:
            if request.finish_reason is FinishReason.LENGTH:
                assert len(request.output) == request.params.max_tokens

    def _submit(
        self, seed: int, length: int, max_tokens: int, demands: Demands, max_rung: int | None
    ) -> None:
        prompt = [20 + (seed * place) % 9 for place in range(length)]
        params = SamplingParams(max_tokens=max_tokens)
        name = str(len(self.requests))
        self.requests.append(Request(name, prompt, params, self.now_s, demands, max_rung))
        self.scheduler.add(self.requests[-1])

    def _active(self) -> list[Request]:
        return [request for request in self.requests if request.status is not Status.FINISHED]

    def _slot(self, request: Request, place: int) -> tuple[int, int]:
        return request.blocks[place // BLOCK], place % BLOCK

    def _schedule(self) -> Batch:
        """A batch, its tokens written down as the model would."""
        ran = {request.id for request in self.scheduler.running}
        batch = self.scheduler.schedule(self.rung)
        self._check_progress(batch)
        for piece in batch:
            assert piece.request.runs_at(self.rung)
            if piece.request.id not in ran:
                self._check_inherited(piece)
            for place in range(piece.start, piece.end):
                (token,) = self._tokens(piece.request, place, place + 1)
                rung = max(piece.request.kv_rung, self.rung)
                salt = piece.request.demands.cache_salt
                self.content[self._slot(piece.request, place)] = token, salt, rung
        return batch

    def _check_progress(self, batch: Batch) -> None:
        assert batch or not self.scheduler.waiting, "nothing runs though something waits for room"

    def _tokens(self, request: Request, start: int, end: int) -> list[int]:
        return request.tokens(start, end)

    def _check_inherited(self, piece: Slice) -> None:
        assert piece.start < piece.request.num_tokens
        for place in range(piece.start):
            assert self.content[self._slot(piece.request, place)][2] <= self.rung

    def _token(self, piece: Slice) -> int:
        return greedy(self._tokens(piece.request, 0, piece.end))

    def _fail(self, batch: Batch, lost: int) -> None:
        """A step of which one slice cannot be computed."""
        for request in self.scheduler.fail([batch[lost]]):
            self.ends[request.id] += 1
        rest = batch[:lost] + batch[lost + 1 :]
        self._update(rest, [self._token(piece) for piece in rest if piece.samples])

    def _update(self, batch: Batch, tokens: Sequence[int | None]) -> None:
        self.now_s += 1
        self._note(self.scheduler.update(batch, tokens))

    def _note(self, outputs: Sequence[tuple[Request, list[int]]]) -> None:
        for request, tokens in outputs:
            assert PENDING not in request.output
            assert request.output[-1:] == tokens or request.finish_reason is FinishReason.ERROR
            self.ends[request.id] += request.status is Status.FINISHED
        self.ends += Counter()  # without zeros
