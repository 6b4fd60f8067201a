"""A device of sizes and times: what the engine's parts need of one, with nothing behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from morphserve.morphcli.simulate.counted import CountedBatch
from morphserve.morphcli.simulate.target import Target
from morphserve.quantize.manifest import Variant
from morphserve.runtime.device.link import BYTES_PER_STEP, Bytes
from morphserve.runtime.memory import MemoryPlan
from morphserve.runtime.parts import Computed, Sampled
from morphserve.runtime.scheduler import Batch

_TOKEN = Sampled(0)


class SimulatedClock:
    """Goes on as steps take time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now_s(self) -> float:
        return self.seconds

    def epoch_s(self) -> float:
        return self.seconds


@dataclass(frozen=True, slots=True)
class Extent:
    """So many bytes, with a size and no content."""

    num_bytes: int
    on_host: bool = False

    def numel(self) -> int:
        return self.num_bytes

    def __getitem__(self, part: slice, /) -> "Extent":
        return Extent(len(range(self.num_bytes)[part]), self.on_host)

    def copy_(self, source: "Extent", /) -> "Extent":
        return self


@dataclass(frozen=True, slots=True)
class SimulatedImage:
    host: Extent


class SimulatedLayers:
    """Sizes of every layer's images, and the active variant of each."""

    def __init__(self, plan: MemoryPlan, variants: Sequence[Variant]) -> None:
        self.variants = list(variants)
        self.images = {
            variant: [SimulatedImage(Extent(count, on_host=True)) for count in of_layers]
            for variant, of_layers in plan.sizes.image_bytes.items()
        }

    def activate(self, layer: int, variant: Variant) -> None:
        self.variants[layer] = variant


class SimulatedDevice:
    """Arena, copy engine and runner in one: all that takes time on the clock."""

    overlaps = False

    def __init__(
        self, target: Target, plan: MemoryPlan, layers: SimulatedLayers, clock: SimulatedClock
    ) -> None:
        self.slowdown = 1.0  # of steps, by what else runs on the machine
        self._target, self._plan, self._clock = target, plan, clock
        self._variants = layers.variants
        self._known_variants: list[Variant] = []  # for which these were calculated:
        self._known_linears: dict[int, float] = {}  # seconds by tokens
        self._known_rest: dict[int, float] = {}  # seconds by sequences
        self._copying_s = 0.0  # copies that the next step waits for
        self._latest_s = 0.0  # duration of the latest step
        self._rate = _bytes_per_s(target)  # within the device

    def span(self, offset: int, num_bytes: int) -> Extent:
        return Extent(num_bytes)

    def copy_blocks(self, moves: Mapping[int, int]) -> None:
        sizes = self._plan.sizes
        self._copying_s += 2 * len(moves) * sizes.num_layers * sizes.page_bytes / self._rate

    def copy(self, destination: Bytes, source: Bytes) -> None:
        """Takes the link's time from the host, the memory's within the device."""
        assert isinstance(source, Extent)
        if not source.on_host:
            self._copying_s += 2 * source.num_bytes / self._rate
        elif not self._target.copies_overlap:
            self._copying_s += source.num_bytes / self._target.copy_bytes_per_s

    def allowance(self) -> int:
        """Bytes that are copied before one step, or beside it where the link is its own."""
        if not self._target.copies_overlap:
            return BYTES_PER_STEP
        beside_s = max(self._latest_s, self._target.idle_step_s)
        return int(beside_s * self._target.copy_bytes_per_s)

    def prepare(self) -> bool:
        return False

    def launch(self, batch: Batch) -> Computed:
        spans = [(piece.start, piece.end) for piece in batch]
        self.pass_time(self.slowdown * self._target.costs.step_seconds(self._variants, spans))
        return Computed([_TOKEN for piece in batch if piece.samples])

    def run_counted(self, batch: CountedBatch) -> None:
        """The step of a batch whose decodes are counted."""
        costs, tokens, num_seqs = self._target.costs, batch.decodes, batch.decodes
        attention_s = costs.decode.of(tokens, batch.context) if tokens else 0.0
        if batch.prefills:
            tokens += sum([end - start for start, end in batch.prefills])
            num_seqs += len(batch.prefills)
            attention_s += costs.prefill.seconds(batch.prefills)
        layers_s = len(self._variants) * attention_s + self._linears_s(tokens)
        self.pass_time(self.slowdown * (layers_s + self._rest_s(num_seqs)))

    def _linears_s(self, tokens: int) -> float:
        """All layers, each token seeing itself alone."""
        if self._known_variants != self._variants:
            self._known_variants = list(self._variants)
            self._known_linears.clear()
        found = self._known_linears.get(tokens)
        if found is None:
            found = self._target.costs.layers_seconds(self._variants, tokens)
            self._known_linears[tokens] = found
        return found

    def _rest_s(self, num_seqs: int) -> float:
        found = self._known_rest.get(num_seqs)
        if found is None:
            found = self._known_rest[num_seqs] = self._target.costs.rest_seconds(num_seqs)
        return found

    def idle(self) -> None:
        """A step without a batch."""
        self.pass_time(0.0 if self._copying_s else self._target.idle_step_s)

    def pass_time(self, seconds: float) -> None:
        """Goes on by a step of so many seconds, and by the copies that it waited for."""
        self._latest_s = seconds
        self._clock.seconds += seconds + self._copying_s
        self._copying_s = 0.0

    def skip(self, last_s: float, end_s: float) -> None:
        """Goes on to the end of steps of which the last one began at `last_s`."""
        self._latest_s = end_s - last_s
        self._clock.seconds = end_s

    def longest_step_s(self, tokens: int, num_seqs: int, context: int) -> float:
        """At least what the controller takes a step of a prompt's first tokens for, full precision.

        Without slowdown.
        """
        costs, num_layers = self._target.costs, len(self._variants)
        attention = costs.prefill.of(tokens, tokens * (tokens + 1) / 2)
        attention += costs.decode.of(num_seqs, context)
        linears = num_layers * costs.layer_seconds(Variant.FULL, tokens)
        return linears + num_layers * attention + costs.rest_seconds(num_seqs + 1)

    def decode_seconds(self, num_seqs: int, context_tokens: int) -> tuple[float, float]:
        """(seconds of a decode step, how much longer than it each step after it takes)

        `context_tokens` are those of all sequences together, the new ones included.
        """
        costs, num_layers = self._target.costs, len(self._variants)
        step_s = (
            self._linears_s(num_seqs)
            + num_layers * costs.decode.of(num_seqs, context_tokens)
            + self._rest_s(num_seqs)
        )
        growth_s = num_layers * costs.decode.per_pair * num_seqs
        return self.slowdown * step_s, self.slowdown * growth_s


def _bytes_per_s(target: Target) -> float:
    """Of reading weights for one token: the rate at which the device's memory is read."""
    full = Variant.FULL
    return target.sizes.image_bytes[full][0] / target.costs.layer_seconds(full, 1)
