"""The scheduler's state machine: with each step noted at once, and with tokens one step late."""

from collections.abc import Sequence

from hypothesis import settings
from hypothesis.stateful import invariant
from scheduler_machine import Machine

from morphserve.runtime.request import PENDING, Request, Status
from morphserve.runtime.scheduler import Batch, Slice

SETTINGS = settings(max_examples=80, stateful_step_count=40, deadline=None)


class EndingMachine(Machine):
    eos = (12,)


class OverlappedMachine(EndingMachine):
    """A step is noted after the next one was launched; the device knows its tokens before."""

    def __init__(self) -> None:
        super().__init__()
        self.in_flight: Batch = []
        self.newest: dict[Request, int | None] = {}  # tokens of the step in flight

    def _schedule(self) -> Batch:
        if self.in_flight and self.scheduler.must_know(self.rung):
            self._settle()
        return super()._schedule()

    def _check_progress(self, batch: Batch) -> None:
        if not self.in_flight:
            super()._check_progress(batch)

    def _tokens(self, request: Request, start: int, end: int) -> list[int]:
        """As the device knows them; it goes on from anything where there is no token."""
        tokens = request.tokens(start, end)
        return [(self.newest[request] or 0) if t == PENDING else t for t in tokens]

    def _update(self, batch: Batch, tokens: Sequence[int | None]) -> None:
        self.now_s += 1
        self._settle()
        self.scheduler.launched(batch)
        sampling = (piece.request for piece in batch if piece.samples)
        self.in_flight, self.newest = batch, dict(zip(sampling, tokens, strict=True))

    def _fail(self, batch: Batch, lost: int) -> None:
        """What is in flight is settled first; each slice alone is known at once."""
        self._settle()
        if batch := [piece for piece in batch if _is_wanted(piece)]:
            super()._fail(batch, lost % len(batch))
        self._settle()

    def _settle(self) -> None:
        batch, self.in_flight = [piece for piece in self.in_flight if _is_wanted(piece)], []
        tokens = [self.newest[piece.request] for piece in batch if piece.samples]
        self._note(self.scheduler.computed(batch, tokens))

    @invariant()
    def only_what_is_in_flight_is_unknown(self) -> None:
        flying = {piece.request for piece in self.in_flight if piece.samples}
        for request in self.requests:
            assert PENDING not in request.output[:-1]
            is_wanted = request in flying and request.status is not Status.FINISHED
            assert request.is_pending == is_wanted
            assert request.num_tokens <= request.max_tokens

    def teardown(self) -> None:
        while self.in_flight:
            self.step(1)
        super().teardown()


def _is_wanted(piece: Slice) -> bool:
    return piece.request.status is not Status.FINISHED


Machine.TestCase.settings = SETTINGS
TestScheduler = Machine.TestCase
EndingMachine.TestCase.settings = SETTINGS
TestSchedulerThatKnowsEndings = EndingMachine.TestCase
OverlappedMachine.TestCase.settings = SETTINGS
TestSchedulerOneStepLate = OverlappedMachine.TestCase
