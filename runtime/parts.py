"""What an engine drives: the control plane's own parts, and what it needs of those that compute.

Nothing here knows a device, so that the same engine also turns on a simulated one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from morphserve.quantize.manifest import Variant
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.costs import CostModel
from morphserve.runtime.ladder import Ladder
from morphserve.runtime.messages import Hello, TokenLogprobs
from morphserve.runtime.scheduler import Batch, Scheduler


class Sampled(msgspec.Struct, frozen=True):
    """What one request gets from a step."""

    token: int | None  # None: the logits held NaN or infinity
    logprobs: TokenLogprobs | None = None  # of the model's distribution, if asked for


class Clock(Protocol):
    def now_s(self) -> float:
        """Seconds that never go back."""

    def epoch_s(self) -> float:
        """Seconds since 1970."""


class SystemClock:
    def now_s(self) -> float:
        return time.monotonic()

    def epoch_s(self) -> float:
        return time.time()


SYSTEM_CLOCK = SystemClock()


class DeviceLost(Exception):
    """The device computes nothing any more in this process: the engine has to end."""


class Launched(Protocol):
    """A step that is being computed."""

    def result(self) -> list[Sampled]:
        """Waits for the step; what each sampling slice got, in batch order.

        Nobody catches what it raises: steps that were launched since build on this one.
        """


class Computed(msgspec.Struct, frozen=True):
    """A step that was computed as it was launched."""

    sampled: list[Sampled]

    def result(self) -> list[Sampled]:
        return self.sampled


class Runner(Protocol):
    overlaps: bool  # `launch` returns before the step has been computed

    def launch(self, batch: Batch) -> Launched:
        """Starts one forward pass.

        A request whose newest token is PENDING had a slice in the launch before this one, and goes
        on from what that slice gets. What is raised concerns this batch alone, and nothing of it
        counts then; a DeviceLost concerns everything.
        """

    def prepare(self) -> bool:
        """Does a little work that spares later steps time; whether there was any."""


class Layers(Protocol):
    variants: list[Variant]  # that each layer computes in


class Swap(Protocol):
    """One layer on its way to another variant."""

    layer: int
    was: Variant
    to: Variant

    @property
    def is_demotion(self) -> bool: ...


class Swapper(Protocol):
    failures: list[str]  # what went wrong, for the caller to report and clear

    @property
    def in_flight(self) -> Sequence[Swap]: ...

    @property
    def has_room(self) -> bool:
        """Whether one more layer may be on its way."""

    def start(self, layer: int, to: Variant) -> bool:
        """Begins a swap; False if its live blocks find no room elsewhere. Between steps only."""

    def advance(self) -> None:
        """Goes on with what is in flight, beside the step that follows."""

    def commit_ready(self) -> Sequence[Swap]:
        """Switches the layers that are complete, and returns them. Between steps only."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the engine drives."""

    vocab_size: int
    max_model_len: int
    ladder: Ladder
    hello: Hello
    pool: BlockPool
    scheduler: Scheduler
    layers: Layers
    swapper: Swapper
    runner: Runner
    cost_model: CostModel | None  # None: nobody measured this device
