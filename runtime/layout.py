"""How settings cut up a device's memory: plan, rungs and capacities, before anything is read."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from morphserve.configs.errors import ConfigError, OutOfBudget
from morphserve.configs.schema import CPU_DEFAULTS, EngineConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.ladder import Ladder
from morphserve.runtime.memory import (
    MemoryPlan,
    ModelSizes,
    budget_for,
    plan_memory,
    staging_bytes,
)
from morphserve.runtime.messages import Hello, MemoryBytes


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a device has, in bytes."""

    total: int
    free: Callable[[], int]
    name: str = "this machine has"
    fills: bool = False  # whether a default budget takes all that is free, wanted or not


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies, and what each rung has room for."""

    plan: MemoryPlan
    ladder: Ladder
    max_model_len: int
    capacities: list[int]  # KV blocks at rung 0, 1, ... the deepest that the policy allows
    variants: list[Variant]  # of each layer, at the start
    max_num_seqs: int = CPU_DEFAULTS.max_num_seqs
    activation_bytes: int | None = None  # beside the arena; None: nobody measured it

    def hello(self, device: str, kernels: str, threads: int, dtype: str) -> Hello:
        """What an engine with this layout says of itself."""
        sizes, plan = self.plan.sizes, self.plan
        return Hello(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            num_layers=sizes.num_layers,
            ladder=list(self.ladder.steps),
            capacities=self.capacities,
            block_tokens=sizes.block_tokens,
            device=device,
            kernels=kernels,
            threads=threads,
            dtype=dtype,
            memory=MemoryBytes(
                budget=plan.num_bytes,
                static=sizes.static_bytes,
                staging=staging_bytes(sizes, len(plan.staging)),
                layers=sum(slab.num_pages for slab in plan.slabs) * sizes.page_bytes,
                page=sizes.page_bytes,
                images={variant: list(image) for variant, image in sizes.image_bytes.items()},
                activations=self.activation_bytes,
            ),
            startup_s={},
        )


def lay_out(
    config: EngineConfig,
    sizes: ModelSizes,
    ladder: Ladder,
    max_position: int,
    memory: DeviceMemory,
    activation_bytes: int | None = None,
) -> Layout:
    """Raises ConfigError or OutOfBudget with what to change."""
    max_model_len = _max_model_len(config, max_position)
    rungs = range(_deepest(config, ladder) + 1)
    held = config.policy.static_layers >= 0
    variants = ladder.variants_at(rungs[-1] if held else 0)
    plan = _plan(config, sizes, variants, max_model_len, memory)
    capacities = [plan.capacity(ladder.variants_at(rung)) for rung in rungs]
    _require_gain(capacities, config.cache.block_tokens)
    max_num_seqs = config.scheduler.max_num_seqs
    return Layout(
        *(plan, ladder, max_model_len, capacities, variants, max_num_seqs, activation_bytes)
    )


def staging_slots(config: EngineConfig) -> int:
    """Policies that never swap while serving need no place to stage a swap."""
    return 0 if config.policy.static_layers >= 0 else config.cache.staging_slots


def _deepest(config: EngineConfig, ladder: Ladder) -> int:
    """The deepest rung that the policy may reach; its share bounds INT4 layers alone."""
    max_int4 = config.policy.max_demoted(ladder.num_layers)
    return ladder.deepest_with(max_int4) if max_int4 else 0


def _max_model_len(config: EngineConfig, max_position: int) -> int:
    asked = config.scheduler.max_model_len
    if asked is None:
        return max_position
    if not 1 < asked <= max_position:
        raise ConfigError(
            f"--max-model-len {asked} is out of range: this model takes 2 to {max_position} tokens"
        )
    return asked


def _plan(
    config: EngineConfig,
    sizes: ModelSizes,
    variants: Sequence[Variant],
    max_model_len: int,
    memory: DeviceMemory,
) -> MemoryPlan:
    """The arena's layout; its KV cache holds at least one request of full length."""
    cache, slots = config.cache, staging_slots(config)
    least = budget_for(sizes, slots, cache.min_run_bytes, max_model_len)
    budget = cache.memory_budget
    if budget is None:
        wanted = config.scheduler.max_num_seqs * max_model_len
        wanted_bytes = budget_for(sizes, slots, cache.min_run_bytes, wanted)
        free = memory.free()
        budget = max(least, free if memory.fills else min(wanted_bytes, free))
    _require_device(budget, memory, asked=cache.memory_budget is not None)
    try:
        plan = plan_memory(sizes, budget, slots, cache.min_run_bytes)
        tokens = plan.capacity(variants) * cache.block_tokens
    except OutOfBudget:
        tokens = 0
    if tokens < max_model_len:
        raise OutOfBudget(
            f"a memory budget of {budget / 2**20:.1f} MiB leaves room for {tokens} tokens of KV "
            f"cache, less than one request of {max_model_len}: raise --memory-budget to "
            f"{math.ceil(least / 2**20)}MiB or lower --max-model-len",
            needed_bytes=least,
        )
    return plan


def _require_device(budget: int, memory: DeviceMemory, *, asked: bool) -> None:
    if budget <= memory.total:
        return
    wanted, total = f"{budget / 2**20:.0f} MiB", f"{memory.total / 2**20:.0f} MiB"
    if asked:
        raise OutOfBudget(
            f"a memory budget of {wanted} is more than {memory.name}: lower --memory-budget "
            f"below {total}"
        )
    raise OutOfBudget(
        f"the model and one request of full length take {wanted}, more than {memory.name} "
        f"({total}): lower --max-model-len"
    )


def _require_gain(capacities: Sequence[int], block_tokens: int) -> None:
    if len(capacities) > 1 and capacities[0] == capacities[-1]:
        raise ConfigError(
            f"no quantised layer frees a whole block of {block_tokens} tokens: "
            "lower --block-size, or serve with --policy off"
        )
