"""CUDA graphs of decode steps, for any mix of layers at any precision.

A graph holds addresses, and every address is a constant: each variant of a layer has its own home,
and so have caches, inputs and results. So a graph is never out of date, whatever was swapped since.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from morphserve.runtime.cuda.buckets import coarse_sizes, fine_sizes, fitting
from morphserve.runtime.cuda.gpu import Gpu, Replay, Run
from morphserve.runtime.cuda.step import ModelStep, Plan
from morphserve.runtime.kernels import LayerWeights

logger = logging.getLogger(__name__)

Mix = tuple[LayerWeights, ...]  # the weights that each layer computes with

# A graph of a whole step saves some 0.03 to 0.1 ms of a step in pieces, and capturing it holds the
# engine up for some 20 to 40 ms (both estimated: 33 gaps between graphs; 320 launches).
PAYS_AFTER = 500  # steps of one mix and size
MAX_EXTRA = 32  # graphs of whole steps beside those of the mix at the start; some 8 MiB each
_MAX_SEEN = 256  # mixes and sizes that are counted


HOW = ("whole", "pieces", "eager")  # a step is one graph, or many, or launched kernel by kernel


@dataclass(slots=True)
class Tally:
    """What was captured, what it took, and how steps were run."""

    whole: int = 0  # graphs of whole steps
    pieces: int = 0  # graphs of a layer, and of what comes before and after all layers
    seconds: float = 0.0
    num_bytes: int = 0  # of device memory
    failure: str = ""  # why nothing is captured any more
    steps: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(HOW, 0)))


@dataclass(frozen=True, slots=True)
class Captured:
    """Graphs that make up one decode step."""

    size: int  # sequences, padding included
    replays: Sequence[Replay]
    how: str  # of HOW

    def run(self) -> None:
        for replay in self.replays:
            replay()


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The graphs of one size from which the step of any mix is put together."""

    enter: Replay
    leave: Replay
    plan: Plan  # layers read it: its memory must stay
    layers: dict[tuple[int, LayerWeights], Replay] = field(default_factory=dict)

    def of(self, mix: Mix) -> list[Replay] | None:
        layers = [self.layers.get(key) for key in enumerate(mix)]
        between = [replay for replay in layers if replay is not None]
        return [self.enter, *between, self.leave] if len(between) == len(mix) else None


class StepGraphs:
    """Whole steps where they were captured, else pieces, else nothing: the caller launches then."""

    def __init__(
        self, gpu: Gpu, step: ModelStep, blank: Callable[[int], None], max_seqs: int
    ) -> None:
        """blank: makes the inputs a step of so many padded sequences, for rehearsals."""
        self._gpu, self._step, self._blank = gpu, step, blank
        self._fine, self._coarse = fine_sizes(max_seqs), coarse_sizes(max_seqs)
        self._first: dict[tuple[Mix, int], Replay] = {}  # of the mix at the start
        self._extra: OrderedDict[tuple[Mix, int], Replay] = OrderedDict()  # the latest used last
        self._pieces: dict[int, _Pieces] = {}
        self._seen: dict[tuple[Mix, int], int] = {}  # steps in pieces for want of one graph
        self.tally = Tally()

    def find(self, num_seqs: int) -> Captured | None:
        """The graphs of a decode step with the layers as they are now."""
        mix = tuple(self._step.active)
        return self._find_whole(mix, num_seqs) or self._find_pieces(mix, num_seqs)

    def count(self, how: str) -> None:
        self.tally.steps[how] += 1

    def capture_first(self) -> None:
        """Whole steps of the mix as it is now, in every size, the largest first.

        The memory that a graph works in is then large enough for all that follow.
        """
        mix = tuple(self._step.active)
        with self._measured():
            for size in reversed(self._fine):
                self._blank(size)
                if replay := self._capture(self._whole(mix, size)):
                    self._first[mix, size] = replay
                    self.tally.whole += 1
                    replay()  # the first launch takes longer, and should fail here if it does

    def rehearse(self, weights: LayerWeights) -> None:
        """Runs a layer in every size, so that captures of its kind find its kernels compiled."""
        for size in sorted({*self._fine, *self._coarse}):
            self._blank(size)
            self._gpu.rehearse(self._whole((weights,), size))

    def capture_pieces(self, views: Sequence[Sequence[LayerWeights]]) -> None:
        """Pieces of every layer in every variant, unless there is one mix alone.

        views: of each layer, the weights in each variant; they need not be in place.
        """
        if all(len(variants) == 1 for variants in views):
            return
        with self._measured():
            for size in reversed(self._coarse):
                self._blank(size)
                if pieces := self._capture_ends(size):
                    self._pieces[size] = pieces
                    self._capture_layers(views, size, pieces)

    def capture_wanted(self) -> bool:
        """One graph of a whole step that was wanted twice or more; False if there is none."""
        wanted = max(self._seen, key=self._seen.__getitem__, default=None)
        if wanted is None or self._seen[wanted] < 2:
            return False
        self._capture_extra(*wanted)
        return True

    def _find_whole(self, mix: Mix, num_seqs: int) -> Captured | None:
        size = fitting(self._fine, num_seqs)
        if size is None:
            return None
        replay = self._first.get((mix, size))
        if replay is None:
            replay = self._extra.get((mix, size))
            if replay is None:
                replay = self._note(mix, size)
            if replay is None:
                return None
            self._extra.move_to_end((mix, size))
        return Captured(size, [replay], "whole")

    def _find_pieces(self, mix: Mix, num_seqs: int) -> Captured | None:
        size = fitting(self._coarse, num_seqs)
        if size is None or (pieces := self._pieces.get(size)) is None:
            return None
        replays = pieces.of(mix)
        return None if replays is None else Captured(size, replays, "pieces")

    def _note(self, mix: Mix, size: int) -> Replay | None:
        """Counts a step that no graph holds; captures it once that pays."""
        if self.tally.failure:
            return None
        if len(self._seen) >= _MAX_SEEN and (mix, size) not in self._seen:
            self._seen.clear()
        count = self._seen[mix, size] = self._seen.get((mix, size), 0) + 1
        return self._capture_extra(mix, size) if count >= PAYS_AFTER else None

    def _capture_extra(self, mix: Mix, size: int) -> Replay | None:
        del self._seen[mix, size]
        # What the kernels need was compiled at the start: nothing is run now, as weights of the mix
        # may not be in place.
        with self._measured():
            replay = self._capture(self._whole(mix, size), is_known=True)
        if replay is not None:
            self._extra[mix, size] = replay
            self.tally.whole += 1
            if len(self._extra) > MAX_EXTRA:
                self._extra.popitem(last=False)
                self.tally.whole -= 1
        return replay

    def _capture_layers(
        self, views: Sequence[Sequence[LayerWeights]], size: int, pieces: _Pieces
    ) -> None:
        for i, variants in enumerate(views):
            for weights in variants:
                run = self._layer(i, weights, size, pieces.plan)
                if replay := self._capture(run, is_known=True):
                    pieces.layers[i, weights] = replay
                    self.tally.pieces += 1

    def _capture_ends(self, size: int) -> _Pieces | None:
        plans: list[Plan] = []
        enter = self._capture(lambda: plans.append(self._step.enter(size)))
        leave = None if enter is None else self._capture(lambda: self._step.leave(size))
        if enter is None or leave is None:
            return None
        self.tally.pieces += 2
        return _Pieces(enter, leave, plans[-1])

    def _whole(self, mix: Mix, size: int) -> Run:
        return lambda: self._step.whole(mix, size, size, size)

    def _layer(self, i: int, weights: LayerWeights, size: int, plan: Plan) -> Run:
        return lambda: self._step.layer(i, weights, size, plan)

    def _capture(self, run: Run, is_known: bool = False) -> Replay | None:
        """None if it fails; then nothing is captured any more.

        A capture that failed leaves torch's allocator in a state that nobody vouches for.
        is_known: whether its kernels have run before.
        """
        if self.tally.failure:
            return None
        try:
            if not is_known:
                self._gpu.rehearse(run)
            return self._gpu.capture(run)
        except Exception as error:
            self.tally.failure = f"{type(error).__name__}: {error}"
            logger.exception(
                "a CUDA graph could not be captured: steps without one launch each kernel by "
                "itself, which may take several milliseconds longer"
            )
            return None

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Adds what captures take to the tally."""
        began, free = time.monotonic(), self._gpu.free_bytes()
        yield
        self.tally.seconds += time.monotonic() - began
        self.tally.num_bytes += max(0, free - self._gpu.free_bytes())
