"""An engine that overlaps, on two streams whose work is done when an adversary says so."""

from collections.abc import Collection, Sequence
from random import Random

from deferred_runner import DeferredRunner, DeferredStep, use_runner
from simulated_streams import SimulatedMemory, SimulatedStream

from morphserve.runtime.build import DeviceParts
from morphserve.runtime.device.streams import StreamLink
from morphserve.runtime.engine import Engine
from morphserve.runtime.kernels import LayerWeights
from morphserve.runtime.parts import Launched, Runner
from morphserve.runtime.scheduler import Batch


class Streams:
    """without: of "side waits" and "compute waits", what is left out."""

    def __init__(self, random: Random, without: Collection[str] = ()) -> None:
        self._random = random
        self.compute = SimulatedStream("compute waits" not in without, lies=False)
        self.side = SimulatedStream("side waits" not in without, lies=False)

    def go_on(self) -> bool:
        """The next piece of work of either; whether there was one that could be done."""
        ready = [stream for stream in (self.compute, self.side) if stream.can_go_on()]
        if ready:
            self._random.choice(ready).go_on()
        return bool(ready)

    def go_on_for_a_while(self) -> None:
        for _ in range(self._random.choice((0, 0, 1, 3, 10, 40))):
            if not self.go_on():
                return


class StreamedRunner(DeferredRunner):
    """Computes steps on the compute stream, each with the weights that were active at launch."""

    def __init__(self, runner: Runner, streams: Streams, active: list[LayerWeights]) -> None:
        super().__init__(runner)
        self._streams, self._active = streams, active

    def launch(self, batch: Batch) -> Launched:
        launched, layers = super().launch(batch), list(self._active)
        self._streams.compute.work.append(lambda: self._compute_next(layers))
        return launched

    def catch_up(self, last: DeferredStep | None = None) -> None:
        assert last is not None
        while last.sampled is None:
            assert self._streams.go_on(), "the streams wait for each other"

    def _compute_next(self, layers: Sequence[LayerWeights]) -> None:
        now, self._active[:] = list(self._active), layers
        self._queue.pop(0).compute(self._runner)
        self._active[:] = now


def put_on_streams(engine: Engine, streams: Streams, *, is_pinned: bool = True) -> None:
    """Gives an engine's steps, swaps and moves of blocks to these."""
    parts = engine._parts
    assert isinstance(parts, DeviceParts)
    use_runner(engine, StreamedRunner(parts.runner, streams, parts.layers.active))
    swapper = parts.swapper
    swapper._link = StreamLink(streams.compute, streams.side, is_pinned=is_pinned)
    swapper._arena = SimulatedMemory(swapper._arena, streams.compute)
