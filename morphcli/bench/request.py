"""What `morph bench` was asked for, and the runs that this takes."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from morphserve.configs.errors import ConfigError
from morphserve.configs.schema import Slo
from morphserve.morphcli.bench.http import host_and_port
from morphserve.morphcli.bench.table import policy_title
from morphserve.morphcli.traces.readers import Reading
from morphserve.morphcli.traces.schedule import Shape


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What `morph bench` was asked for."""

    model: str  # folder, or demo
    trace: Path
    shape: Shape
    policies: tuple[str, ...]
    slo: Slo
    output: Path  # folder; made if missing
    bundle: Path | None = None
    memory_budget: str | None = None
    max_model_len: int | None = None
    device: str = "auto"  # of the servers, as `morph serve` takes it
    prompts: Path | None = None  # text file; None: the model folder's held-out text
    references: Path | None = None  # JSONL of prompts with what is right to answer
    url: str | None = None  # a running server; None: start one per policy
    api_key: str | None = field(default=None, repr=False)  # of that server
    timeout_s: float = 120.0  # per request
    reading: Reading = Reading()  # of the trace, beyond what its header tells
    force: bool = False  # replace a finished run in `output`
    is_simulated: bool = False  # no server is started
    repeat: int = 1  # runs of each policy
    rates: tuple[float, ...] = (1.0,)  # loads of a sweep, over that of `shape`

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ConfigError(f"--repeat must be at least 1, not {self.repeat}")
        if not all(0 < rate < math.inf for rate in self.rates):
            raise ConfigError("--rates must be above 0, as 0.5,1,2")
        if len(set(self.rates)) < len(self.rates) or not self.rates:
            raise ConfigError("--rates: name each load once, as 0.5,1,2")
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError("--timeout must be a number of seconds above 0")
        if self.url is not None and "@" in self.url:  # it stands in every report
            raise ConfigError("--url must hold no user or password: give a key with --api-key")
        if self.url is not None:
            host_and_port(self.url)
        if self.url is not None or self.is_simulated:
            return
        needs_bundle = [name for name in self.policies if name != "full"]
        if self.bundle is None and needs_bundle:
            raise ConfigError(
                f"{', '.join(needs_bundle)} needs INT4 layers: give --bundle, made by "
                f"`morph quantize {self.model}`"
            )
        if self.memory_budget is None and len(self.policies) > 1:
            raise ConfigError(
                "give --memory-budget, as 96MiB: policies compare only where every server has the "
                "same memory"
            )


def parse_rates(text: str) -> tuple[float, ...]:
    """Loads from `0.5,1,2`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--rates {text!r}: write multiples of the load, as 0.5,1,2") from None


def main_rate(rates: Sequence[float]) -> float:
    """Of a sweep, the load that is told in full: the nearest to the schedule's own."""
    return min(rates, key=lambda rate: abs(math.log(rate)))


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a comparison."""

    policy: str
    repeat: int
    rate: float

    @property
    def name(self) -> str:
        """What tells it from the policy's other runs; empty for the first."""
        return "" if not self.repeat and self.rate == 1 else f"{self.rate:g}-{self.repeat + 1}"

    @property
    def title(self) -> str:
        rate = "" if self.rate == 1 else f" × {self.rate:g}"
        again = f" ({self.repeat + 1})" if self.repeat else ""
        return f"{policy_title(self.policy)}{rate}{again}"


def jobs_of(request: BenchRequest) -> list[Job]:
    """Every run, in the order in which they are carried out.

    Repeats come one after another, each with all policies in an order of its own, drawn by the
    seed: what else the machine does then meets no policy more than another.
    """
    rng, jobs = random.Random(request.shape.seed), []
    for repeat in range(request.repeat):
        block = [Job(p, repeat, rate) for rate in request.rates for p in request.policies]
        if request.repeat > 1:
            rng.shuffle(block)
        jobs += block
    return jobs
