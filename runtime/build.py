"""From an engine's settings to its parts: the one place where they are put together."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from morphserve.configs.schema import EngineConfig
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.costs import DeviceCosts
from morphserve.quantize.machine import device_name, free_memory
from morphserve.quantize.manifest import Variant
from morphserve.runtime.arena import Arena
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.costs import CostModel, cost_model
from morphserve.runtime.engine import Engine
from morphserve.runtime.kernels import AttentionShape, Kernels
from morphserve.runtime.layers import Layers
from morphserve.runtime.layout import DeviceMemory, Layout, lay_out, staging_slots
from morphserve.runtime.loader import LoadedModel, load_model
from morphserve.runtime.memory import budget_for
from morphserve.runtime.messages import Hello
from morphserve.runtime.model import Model, place_statics, rope_table
from morphserve.runtime.parts import Parts
from morphserve.runtime.runner import Runner
from morphserve.runtime.scheduler import Scheduler
from morphserve.runtime.sizing import outline_model
from morphserve.runtime.swapper import Swapper


@dataclass(frozen=True, slots=True)
class DeviceParts(Parts):
    """Parts on this machine's device."""

    model: Model


def build_engine(config: EngineConfig) -> Engine:
    """An engine that is ready to serve. Raises MorphError with what to change."""
    return Engine(config, build(config))


def build(config: EngineConfig) -> DeviceParts:
    """Loads the model and lays out its memory. Raises MorphError with what to change."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_model(config)
    loaded = time.monotonic()
    parts = assemble(config, model, layout_of(config, model))
    parts.hello.startup_s.update(model.load_s, arena=time.monotonic() - loaded)
    return parts


def foretell(config: EngineConfig, model: LoadedModel) -> Hello:
    """What the engine of this model will say of itself. Raises MorphError as `build` does."""
    return _hello(layout_of(config, model), model)


def budget_for_tokens(config: EngineConfig, num_tokens: int) -> int:
    """Least memory budget in bytes that holds the model and, at full precision, so much KV."""
    sizes = outline_model(config).sizes(config.cache.block_tokens)
    return budget_for(sizes, staging_slots(config), config.cache.min_run_bytes, num_tokens)


def layout_of(config: EngineConfig, model: LoadedModel) -> Layout:
    """The layout of this model on this machine."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = model.sizes(config.cache.block_tokens)
    memory = DeviceMemory(total, lambda: free_memory() // 2)
    return lay_out(config, sizes, model.ladder, model.architecture.max_position, memory)


def assemble(config: EngineConfig, model: LoadedModel, layout: Layout) -> DeviceParts:
    """Puts the images into an arena and connects the parts around it."""
    architecture, plan, variants = model.architecture, layout.plan, layout.variants
    arena = Arena(plan)
    pool = BlockPool(plan.base_blocks)
    for layer, slab in enumerate(plan.slabs):
        for part in slab.freed_between(Variant.FULL, variants[layer]):
            pool.publish((layer, part), slab.blocks[part])
    layers = Layers(arena, plan, model.images, variants)
    scheduler = Scheduler(
        config.scheduler,
        pool,
        config.cache.block_tokens,
        layout.max_model_len,
        architecture.eos_token_ids,
        config.cache.enable_prefix_caching,
    )
    forward = Model(
        kernels=model.kernels,
        static=place_statics(arena, model.statics),
        layers=layers.active,
        caches=[arena.cache(i, model.dtype) for i in range(architecture.num_layers)],
        cos_sin=rope_table(architecture, layout.max_model_len),
        shape=_attention_shape(architecture, config.cache.block_tokens),
    )
    return DeviceParts(
        vocab_size=architecture.vocab_size,
        max_model_len=layout.max_model_len,
        ladder=layout.ladder,
        hello=_hello(layout, model),
        pool=pool,
        scheduler=scheduler,
        layers=layers,
        swapper=Swapper(arena, plan, layers, pool, scheduler.move_blocks),
        model=forward,
        runner=Runner(forward, architecture.eos_token_ids),
        cost_model=measured_costs(model),
    )


def measured_costs(model: LoadedModel) -> CostModel | None:
    """Of the times that were measured as the model is served."""
    costs = costs_of(model.costs, model.kernels, model.dtype)
    return None if costs is None else cost_model(costs)


def costs_of(
    measured: Sequence[DeviceCosts], kernels: Kernels, dtype: torch.dtype
) -> DeviceCosts | None:
    """The times of this device with these kernels and this dtype, and as many threads as now."""
    here = device_name(), kernels.name, torch.get_num_threads(), str(dtype).removeprefix("torch.")
    fitting = (c for c in measured if (c.device, c.kernels, c.threads, c.dtype) == here)
    return next(fitting, None)


def _hello(layout: Layout, model: LoadedModel) -> Hello:
    dtype = str(model.dtype).removeprefix("torch.")
    return layout.hello(device_name(), model.kernels.name, torch.get_num_threads(), dtype)


def _attention_shape(architecture: Architecture, block_tokens: int) -> AttentionShape:
    return AttentionShape(
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        block_tokens=block_tokens,
        norm_eps=architecture.norm_eps,
    )
