"""Whole steps of an engine: sequences that decode, and a chunk of a prompt."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from morphserve.morphcli.bench.kernels.models import Shape, build_variants, layer_weights
from morphserve.morphcli.bench.kernels.race import in_turns
from morphserve.morphcli.bench.kernels.result import Machine, StepTime, Work
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import DeviceParts
from morphserve.runtime.kernels import Kernels
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.scheduler import Slice

MODELS = (
    Shape("10M", 6, 320, 896, 5, 5, vocab=8192, tied=True),
    Shape("135M", 30, 576, 1536, 9, 3, vocab=32000, tied=True),
    Shape("1.1B", 22, 2048, 5632, 32, 4, vocab=32000, tied=False),
)
CONTEXT = 512
SEQUENCES = (1, 8, 32)
STEP_S = 1.0  # of each size, all variants


class StepTimer:
    """Times the variants of one model in turns."""

    def __init__(self, shape: Shape, kernels: Kernels, machine: Machine) -> None:
        self._shape, self._machine = shape, machine
        self._arch = shape.architecture(CONTEXT + 1)
        self._variants = build_variants(shape, kernels, max(SEQUENCES), CONTEXT)

    def decode(self, sequences: int) -> list[StepTime]:
        """A step of so many sequences, at full precision and at INT4."""
        return self._times(sequences, 1)

    def prefill(self) -> list[StepTime]:
        """A prompt in one chunk, the same."""
        return self._times(1, CONTEXT)

    def _times(self, sequences: int, new: int) -> list[StepTime]:
        with _steps(self._variants, sequences, new) as calls:
            times = in_turns([(call, lambda: None) for call in calls], STEP_S)
        return [
            self._told(variant, sequences, new, seconds)
            for variant, seconds in zip(self._variants, times, strict=True)
        ]

    def _told(self, variant: Variant, sequences: int, new: int, seconds: float) -> StepTime:
        work = self._work(variant, sequences, new)
        machine = self._machine
        reading = machine.least_seconds(Work(work.num_bytes))
        multiplying = machine.least_seconds(Work(0, work.multiply_adds, work.kind))
        return StepTime(
            model=self._shape.name,
            variant=variant.value,
            sequences=sequences,
            tokens=sequences * new,
            context=CONTEXT,
            work=work,
            seconds=seconds,
            of_read=reading / seconds,
            of_peak=multiplying / seconds,
        )

    def _work(self, variant: Variant, sequences: int, new: int) -> Work:
        arch, parts = self._arch, self._variants[variant]
        images = parts.hello.memory.images[variant]
        head = parts.model.static.head.weight.nbytes
        kept = 2 * arch.num_layers * arch.kv_size * sequences * CONTEXT  # keys and values
        tokens = sequences * new
        seen = CONTEXT - (new - 1) / 2  # tokens that a query looks at, on average
        products = tokens * arch.num_layers * (layer_weights(arch) + 2 * seen * arch.q_size)
        return Work(
            num_bytes=sum(images) + head + kept * parts.model.caches[0].itemsize,
            multiply_adds=int(products) + sequences * arch.vocab_size * arch.hidden_size,
            kind="bfloat16" if variant is Variant.FULL else "int8",
        )


@contextmanager
def _steps(
    variants: Mapping[Variant, DeviceParts], sequences: int, new: int
) -> Iterator[list[Callable[[int], object]]]:
    """A call per variant that computes the last `new` tokens of every sequence, and samples."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    batches = {
        variant: [_slice(i, parts, params, new) for i in range(sequences)]
        for variant, parts in variants.items()
    }

    def step(variant: Variant) -> Callable[[int], object]:
        return lambda _: variants[variant].runner.launch(batches[variant]).result()

    yield [step(variant) for variant in variants]
    for variant, batch in batches.items():
        for piece in batch:
            variants[variant].pool.free(piece.request.blocks)


def _slice(i: int, parts: DeviceParts, params: SamplingParams, new: int) -> Slice:
    tokens = [(7 * j + i) % parts.vocab_size for j in range(CONTEXT)]
    request = Request(str(i), tokens, params, 0.0)
    request.blocks = parts.pool.allocate(-(-CONTEXT // parts.model.shape.block_tokens))
    return Slice(request, CONTEXT - new, CONTEXT)
