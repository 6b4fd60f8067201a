"""From an engine's settings to its parts: the one place where they are put together."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from morphserve.configs.errors import ConfigError, OutOfBudget
from morphserve.configs.schema import EngineConfig
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.machine import device_name, free_memory
from morphserve.quantize.manifest import Variant
from morphserve.runtime.arena import Arena
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.costs import CostModel, cost_model
from morphserve.runtime.kernels import AttentionShape
from morphserve.runtime.ladder import Ladder
from morphserve.runtime.layers import Layers
from morphserve.runtime.loader import LoadedModel, load_model
from morphserve.runtime.memory import MemoryPlan, budget_for, plan_memory, staging_bytes
from morphserve.runtime.messages import Hello, MemoryBytes
from morphserve.runtime.model import Model, place_statics, rope_table
from morphserve.runtime.runner import Runner
from morphserve.runtime.scheduler import Scheduler
from morphserve.runtime.sizing import outline_model
from morphserve.runtime.swapper import Swapper


@dataclass(frozen=True, slots=True)
class Parts:
    """What the engine drives."""

    architecture: Architecture
    max_model_len: int
    ladder: Ladder
    hello: Hello
    pool: BlockPool
    scheduler: Scheduler
    layers: Layers
    swapper: Swapper
    model: Model
    runner: Runner
    cost_model: CostModel | None  # None: nobody measured this device


def build(config: EngineConfig) -> Parts:
    """Loads the model and lays out its memory. Raises MorphError with what to change."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_model(config)
    loaded = time.monotonic()
    max_model_len = _max_model_len(config, model.architecture)
    plan = _plan(config, model, max_model_len)
    parts = assemble(config, model, plan, max_model_len)
    parts.hello.startup_s.update(model.load_s, arena=time.monotonic() - loaded)
    return parts


def foretell(config: EngineConfig, model: LoadedModel) -> Hello:
    """What the engine of this model will say of itself. Raises MorphError as `build` does."""
    max_model_len = _max_model_len(config, model.architecture)
    plan = _plan(config, model, max_model_len)
    return _hello(config, model, plan, max_model_len)


def budget_for_tokens(config: EngineConfig, num_tokens: int) -> int:
    """Least memory budget in bytes that holds the model and, at full precision, so much KV."""
    sizes = outline_model(config).sizes(config.cache.block_tokens)
    return budget_for(sizes, _staging_slots(config), config.cache.min_run_bytes, num_tokens)


def assemble(
    config: EngineConfig, model: LoadedModel, plan: MemoryPlan, max_model_len: int
) -> Parts:
    """Puts the images into an arena and connects the parts around it."""
    architecture = model.architecture
    arena = Arena(plan)
    variants = _variants_at_start(config, model)
    pool = BlockPool(plan.base_blocks)
    for layer, slab in enumerate(plan.slabs):
        for part in slab.freed_between(Variant.FULL, variants[layer]):
            pool.publish((layer, part), slab.blocks[part])
    layers = Layers(arena, plan, model.images, variants)
    scheduler = Scheduler(
        config.scheduler,
        pool,
        config.cache.block_tokens,
        max_model_len,
        architecture.eos_token_ids,
        config.cache.enable_prefix_caching,
    )
    forward = Model(
        kernels=model.kernels,
        static=place_statics(arena, model.statics),
        layers=layers.active,
        caches=[arena.cache(i, model.dtype) for i in range(architecture.num_layers)],
        cos_sin=rope_table(architecture, max_model_len),
        shape=_attention_shape(architecture, config.cache.block_tokens),
    )
    return Parts(
        architecture=architecture,
        max_model_len=max_model_len,
        ladder=model.ladder,
        hello=_hello(config, model, plan, max_model_len),
        pool=pool,
        scheduler=scheduler,
        layers=layers,
        swapper=Swapper(arena, plan, layers, pool, scheduler.move_blocks),
        model=forward,
        runner=Runner(forward, architecture.eos_token_ids),
        cost_model=_cost_model(model),
    )


def _cost_model(model: LoadedModel) -> CostModel | None:
    """Of the times that were measured on this device with these kernels, threads and dtype."""
    dtype, threads = str(model.dtype).removeprefix("torch."), torch.get_num_threads()
    here = (device_name(), model.kernels.name, threads, dtype)
    fitting = (c for c in model.costs if (c.device, c.kernels, c.threads, c.dtype) == here)
    costs = next(fitting, None)
    return None if costs is None else cost_model(costs)


def _hello(config: EngineConfig, model: LoadedModel, plan: MemoryPlan, max_model_len: int) -> Hello:
    sizes = plan.sizes
    return Hello(
        max_model_len=max_model_len,
        num_layers=model.architecture.num_layers,
        ladder=list(model.ladder.steps),
        capacities=_capacities(config, model, plan),
        block_tokens=sizes.block_tokens,
        device=device_name(),
        kernels=model.kernels.name,
        dtype=str(model.dtype).removeprefix("torch."),
        memory=MemoryBytes(
            budget=plan.num_bytes,
            static=sizes.static_bytes,
            staging=staging_bytes(sizes, len(plan.staging)),
            layers=sum(slab.num_pages for slab in plan.slabs) * sizes.page_bytes,
            page=sizes.page_bytes,
            images={variant: list(image) for variant, image in sizes.image_bytes.items()},
        ),
        startup_s={},
    )


def _deepest(config: EngineConfig, model: LoadedModel) -> int:
    """The deepest rung that the policy may reach; its share bounds INT4 layers alone."""
    max_int4 = config.policy.max_demoted(model.architecture.num_layers)
    return model.ladder.deepest_with(max_int4) if max_int4 else 0


def _capacities(config: EngineConfig, model: LoadedModel, plan: MemoryPlan) -> list[int]:
    """KV blocks at rung 0, 1, ... the deepest."""
    rungs = range(_deepest(config, model) + 1)
    return [plan.capacity(model.ladder.variants_at(rung)) for rung in rungs]


def _variants_at_start(config: EngineConfig, model: LoadedModel) -> list[Variant]:
    held = config.policy.static_layers >= 0
    return model.ladder.variants_at(_deepest(config, model) if held else 0)


def _max_model_len(config: EngineConfig, architecture: Architecture) -> int:
    asked = config.scheduler.max_model_len
    if asked is None:
        return architecture.max_position
    if not 1 < asked <= architecture.max_position:
        raise ConfigError(
            f"--max-model-len {asked} is out of range: this model takes 2 to "
            f"{architecture.max_position} tokens"
        )
    return asked


def _plan(config: EngineConfig, model: LoadedModel, max_model_len: int) -> MemoryPlan:
    """The arena's layout; its KV cache holds at least one request of full length."""
    cache = config.cache
    sizes = model.sizes(cache.block_tokens)
    slots = _staging_slots(config)
    least = budget_for(sizes, slots, cache.min_run_bytes, max_model_len)
    budget = cache.memory_budget
    if budget is None:
        wanted = config.scheduler.max_num_seqs * max_model_len
        wanted_bytes = budget_for(sizes, slots, cache.min_run_bytes, wanted)
        budget = max(least, min(wanted_bytes, free_memory() // 2))
    _require_machine(budget)
    try:
        plan = plan_memory(sizes, budget, slots, cache.min_run_bytes)
        tokens = plan.capacity(_variants_at_start(config, model)) * cache.block_tokens
    except OutOfBudget:
        tokens = 0
    if tokens < max_model_len:
        raise OutOfBudget(
            f"a memory budget of {budget / 2**20:.1f} MiB leaves room for {tokens} tokens of KV "
            f"cache, less than one request of {max_model_len}: raise --memory-budget to "
            f"{math.ceil(least / 2**20)}MiB or lower --max-model-len",
            needed_bytes=least,
        )
    _require_gain(_capacities(config, model, plan), cache.block_tokens)
    return plan


def _require_machine(budget: int) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if budget > machine:
        raise OutOfBudget(
            f"a memory budget of {budget / 2**20:.0f} MiB is more than this machine has: lower "
            f"--memory-budget below {machine / 2**20:.0f} MiB"
        )


def _require_gain(capacities: Sequence[int], block_tokens: int) -> None:
    if len(capacities) > 1 and capacities[0] == capacities[-1]:
        raise ConfigError(
            f"no quantised layer frees a whole block of {block_tokens} tokens: "
            "lower --block-size, or serve with --policy off"
        )


def _staging_slots(config: EngineConfig) -> int:
    """Policies that never swap while serving need no place to stage a swap."""
    return 0 if config.policy.static_layers >= 0 else config.cache.staging_slots


def _attention_shape(architecture: Architecture, block_tokens: int) -> AttentionShape:
    return AttentionShape(
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        block_tokens=block_tokens,
        norm_eps=architecture.norm_eps,
    )
