"""What is simulated: a model on a device, by sizes and times."""

from collections.abc import Mapping
from dataclasses import dataclass

from morphserve.quantize.manifest import Rung
from morphserve.runtime.costs import CostModel
from morphserve.runtime.memory import ModelSizes


@dataclass(frozen=True, slots=True)
class Target:
    """One replica's device and model."""

    device: str
    model: str
    max_position: int  # tokens of context
    sizes: ModelSizes
    costs: CostModel
    copy_bytes_per_s: float  # of weights on their way to the device
    copies_overlap: bool  # copies run beside a step's kernels; else they prolong the step
    memory_bytes: int  # that the device has
    reserved_bytes: int = 0  # of these, for activations and the driver
    idle_step_s: float = 1e-3  # time to the engine's next look when nothing runs
    ladder: tuple[Rung, ...] | None = None  # None: front to back, through the variants there are
    about: Mapping[str, str] | None = None  # constants and their sources, for the report
