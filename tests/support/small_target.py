"""A device of sizes and times on which simulations are short and exact."""

from dataclasses import replace

from morphserve.configs.schema import CacheConfig, SchedulerConfig
from morphserve.morphcli.simulate.fleet import Fleet
from morphserve.morphcli.simulate.target import Target
from morphserve.morphcli.traces.arrivals import Arrival
from morphserve.morphcli.traces.schedule import Schedule
from morphserve.quantize.costs import Curve
from morphserve.quantize.manifest import Variant
from morphserve.runtime.costs import AttentionCost, CostModel
from morphserve.runtime.memory import ModelSizes

TICK_S = 2.0**-10  # of these sums are exact, in whatever order they are made
FREE = AttentionCost(0.0, 0.0, 0.0, error=0.0)
# A layer takes a tick per token at full precision and half of it at INT4; the rest of a step none.
COSTS = CostModel(
    layers={
        Variant.FULL: Curve([1, 2], [TICK_S, 2 * TICK_S]),
        Variant.INT4: Curve([1, 2], [TICK_S / 2, TICK_S]),
    },
    decode=FREE,
    prefill=FREE,
    rest=Curve([1, 2], [0.0, 0.0]),
)
# Four layers; a block takes 4 KiB, and a layer at INT4 frees twelve of them.
SIZES = ModelSizes(
    static_bytes=1024,
    image_bytes={Variant.FULL: (65536,) * 4, Variant.INT4: (16384,) * 4},
    kv_bytes_per_token=64,
    block_tokens=16,
)
TARGET = Target(
    device="small",
    model="small",
    max_position=256,
    sizes=SIZES,
    costs=COSTS,
    copy_bytes_per_s=2.0**20,
    copies_overlap=True,
    memory_bytes=2**30,
    idle_step_s=TICK_S,
)
FIXED_BYTES = 4 * 65536 + 1024 + 2 * 16384  # weights and staging


def small_fleet(num_blocks: int = 24, **changes: object) -> Fleet:
    """A replica that has so many blocks, a multiple of twelve, where layers may be swapped."""
    cache = CacheConfig(
        memory_budget=FIXED_BYTES + num_blocks * 4096, min_run_bytes=1, enable_prefix_caching=False
    )
    fleet = Fleet(TARGET, cache=cache, limits=SchedulerConfig(8, 64, 128))
    return replace(fleet, **changes)  # type: ignore[arg-type]


def schedule(*times_s: float, prompt: int = 10, output: int = 5) -> Schedule:
    """Equal requests at these times."""
    return Schedule(tuple(Arrival(at, prompt, output) for at in times_s), max(times_s) + 1.0)
