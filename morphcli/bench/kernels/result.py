"""What is told of kernels, steps and the machine; every time in seconds."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rates:
    """Something per second: of one thread, and of all that were asked for together."""

    one: float
    together: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it was measured, and the most that it can do."""

    device: str
    cores: int
    threads: int
    torch: str
    load_before: float  # load average of the last minute
    load_after: float
    read_bytes: Rates
    multiply_adds: Mapping[str, Rates]  # float32, bfloat16, int8: those it has instructions for

    @property
    def others(self) -> float:
        """Cores that other work took, by what the load averages let see.

        They are of the whole machine, of which `cores` may be a part, and of the last minute.
        """
        return max(self.load_before, self.load_after - self.threads)

    @property
    def is_quiet(self) -> bool:
        return self.others <= 0.1 * self.cores

    def least_seconds(self, work: "Work") -> float:
        """That reading and multiplying take where nothing else does, side by side."""
        reading = work.num_bytes / self.read_bytes.together
        if not work.multiply_adds:
            return reading
        rates = self.multiply_adds
        rate = rates.get(work.kind) or rates["float32"]  # without an instruction of its own
        return max(reading, work.multiply_adds / rate.together)


@dataclass(frozen=True, slots=True)
class Work:
    """What has to be done at least."""

    num_bytes: int  # weights and KV that are read
    multiply_adds: int = 0
    kind: str = "bfloat16"  # of them, as in Machine.multiply_adds


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel at one size against the fastest of torch's ways to the same result."""

    kernel: str
    size: str
    rows: int
    work: Work | None  # None: what it reads is in the caches, as in a step
    seconds: float
    torch_route: str | None  # None: this torch has none
    torch_seconds: float | None
    of_limit: float | None  # the least time that the work takes, over the time that was measured

    @property
    def speedup(self) -> float | None:
        return None if self.torch_seconds is None else self.torch_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step of a model: so many sequences decode, or one chunk of a prompt."""

    model: str
    variant: str  # full or int4, of all layers
    sequences: int
    tokens: int  # computed in the step
    context: int
    work: Work
    seconds: float
    of_read: float  # bytes over time, over the read rate
    of_peak: float  # multiply-adds over time, over the rate of their kind

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class KernelBench:
    machine: Machine
    kernels: list[KernelTime]
    decode: list[StepTime]
    prefill: list[StepTime]
    notes: list[str]  # what was left out, and why
