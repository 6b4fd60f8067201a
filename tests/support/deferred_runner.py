"""A runner that overlaps: what it computes is seen one step late, as on a device with one queue."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

from morphserve.runtime.build import DeviceParts
from morphserve.runtime.engine import Engine
from morphserve.runtime.parts import DeviceLost, Launched, Runner, Sampled
from morphserve.runtime.request import PENDING, Request, needs_history
from morphserve.runtime.scheduler import Batch, Slice


@dataclass
class DeferredStep:
    """A launched step, with all that the host knew of it then."""

    runner: "DeferredRunner"
    batch: Batch  # of copies
    before: "DeferredStep | None"
    sources: dict[int, int]  # place in the batch -> place of the token before it in `before`
    rows: dict[Request, int] = field(default_factory=dict)  # place of its token, by request
    sampled: list[Sampled] | None = None
    was_read: bool = False

    def result(self) -> list[Sampled]:
        assert not self.was_read
        self.was_read = True
        self.runner.catch_up(self)
        assert self.sampled is not None
        return self.sampled

    def compute(self, runner: Runner) -> None:
        for place, row in self.sources.items():
            assert self.before is not None and self.before.sampled is not None
            token = self.before.sampled[row].token
            self.batch[place].request.output[-1] = 0 if token is None else token
        self.before = None
        self.sampled = runner.launch(self.batch).result()


class Overlapping:
    """What runners that compute beside the host have in common."""

    overlaps = True

    def prepare(self) -> bool:
        return False


class DeferredRunner(Overlapping):
    """Hands each step to another runner when somebody waits for it, strictly in launch order.

    Sees to what a device relies on: one step is unread at most when the next is launched, and an
    unknown token is the only one of its slice, and was sampled by the launch before. Where it is
    not so the device is lost, as engines get over all other errors of a launch.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._queue: list[DeferredStep] = []  # launched, not computed
        self._latest: DeferredStep | None = None
        self._before: DeferredStep | None = None
        self.num_launches = 0
        self.num_overlapped = 0  # launches while a step was unread
        self.num_unknown = 0  # slices that went on from a token that the host did not know

    def launch(self, batch: Batch) -> Launched:
        try:
            step = self._note(batch)
        except AssertionError as error:
            raise DeviceLost(f"the runner was misled: {error}") from error
        self._queue.append(step)
        return step

    def _note(self, batch: Batch) -> DeferredStep:
        latest = self._latest
        assert self._before is None or self._before.was_read, "two steps are unread"
        step = DeferredStep(self, [], latest, {})
        for place, piece in enumerate(batch):
            request = piece.request
            copy = replace(request, output=list(request.output), blocks=list(request.blocks))
            if request.is_pending:
                assert piece.end == request.num_tokens == piece.start + 1
                assert not needs_history(request.params)
                assert latest is not None and not latest.was_read
                step.sources[place] = latest.rows[request]
            assert PENDING not in request.output[:-1]
            step.batch.append(Slice(copy, piece.start, piece.end))
            assert step.batch[-1].samples == piece.samples
            if piece.samples:
                step.rows[request] = len(step.rows)
        self.num_launches += 1
        self.num_overlapped += latest is not None and not latest.was_read
        self.num_unknown += len(step.sources)
        self._before, self._latest = latest, step
        return step

    def catch_up(self, last: DeferredStep | None = None) -> None:
        """Computes what was launched, up to this step, or all."""
        while self._queue and (last is None or last.sampled is None):
            self._queue.pop(0).compute(self._runner)


def defer(engine: Engine) -> DeferredRunner:
    """Makes an engine overlap. What is ordered behind its steps on a device waits for them here."""
    parts = engine._parts
    assert isinstance(parts, DeviceParts)
    runner = DeferredRunner(parts.runner)
    use_runner(engine, runner)

    def after_steps(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def waiting(*args: Any) -> Any:
            runner.catch_up()
            return function(*args)

        return waiting

    swapper = parts.swapper
    swapper.start = after_steps(swapper.start)  # type: ignore[method-assign]
    swapper._commit = after_steps(swapper._commit)  # type: ignore[method-assign]
    return runner


def use_runner(engine: Engine, runner: Runner) -> None:
    """Gives an engine another runner."""
    engine._steps._parts = replace(engine._parts, runner=runner)
