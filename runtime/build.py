"""From an engine's settings to its parts: the one place where they are put together."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from morphserve.configs.schema import EngineConfig
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.costs import DeviceCosts
from morphserve.quantize.manifest import Variant
from morphserve.runtime.arena import Arena
from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.costs import CostModel, cost_model
from morphserve.runtime.device import Device
from morphserve.runtime.engine import Engine
from morphserve.runtime.kernels import AttentionShape, Kernels
from morphserve.runtime.ladder import Ladder, steps_of
from morphserve.runtime.layers import Layers
from morphserve.runtime.layout import Layout, lay_out, staging_slots
from morphserve.runtime.loader import LoadedModel, load_model
from morphserve.runtime.memory import budget_for, plan_memory
from morphserve.runtime.messages import Hello
from morphserve.runtime.model import Model, place_statics, rope_table
from morphserve.runtime.parts import Parts
from morphserve.runtime.rehearsal import largest_step
from morphserve.runtime.scheduler import Scheduler
from morphserve.runtime.sizing import outline_model
from morphserve.runtime.swapper import Swapper


@dataclass(frozen=True, slots=True)
class DeviceParts(Parts):
    """Parts on this machine's device."""

    layers: Layers
    model: Model


def build_engine(config: EngineConfig) -> Engine:
    """An engine that is ready to serve. Raises MorphError with what to change."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_model(config)
    config = config.settled(model.device.defaults)
    return Engine(config, build(config, model))


def build(config: EngineConfig, model: LoadedModel) -> DeviceParts:
    """Lays out the model's memory and fills it. Raises MorphError with what to change."""
    loaded = time.monotonic()
    activation_bytes = _measure(config, model)
    measured = time.monotonic()
    parts = assemble(config, model, layout_of(config, model, activation_bytes))
    model.device.warm_up(parts.runner, parts.layers)
    parts.hello.startup_s.update(model.load_s)
    if activation_bytes is not None:
        parts.hello.startup_s["measuring"] = measured - loaded
    parts.hello.startup_s["arena"] = time.monotonic() - measured
    return parts


def foretell(config: EngineConfig, model: LoadedModel) -> Hello:
    """What the engine of this model will say of itself, but for what it measures.

    Raises MorphError as `build` does.
    """
    return _hello(layout_of(config.settled(model.device.defaults), model), model)


def budget_for_tokens(config: EngineConfig, num_tokens: int) -> int:
    """Least memory budget in bytes that holds the model and, at full precision, so much KV."""
    model = outline_model(config)
    config = config.settled(model.device.defaults)
    sizes = model.sizes(config.cache.block_tokens)
    return budget_for(sizes, staging_slots(config), config.cache.min_run_bytes, num_tokens)


def layout_of(
    config: EngineConfig, model: LoadedModel, activation_bytes: int | None = None
) -> Layout:
    """The layout of this model on its device."""
    sizes = model.sizes(config.cache.block_tokens)
    memory = model.device.memory(config.cache, activation_bytes or 0)
    max_position = model.architecture.max_position
    return lay_out(config, sizes, model.ladder, max_position, memory, activation_bytes)


def _measure(config: EngineConfig, model: LoadedModel) -> int | None:
    """Bytes beside the arena that the largest steps take; None: the device need not know."""
    measured = [
        model.device.measure(partial(_rehearse, config, model, variant)) for variant in model.images
    ]
    known = [taken for taken in measured if taken is not None]
    return max(known) if known else None


def _rehearse(config: EngineConfig, model: LoadedModel, variant: Variant) -> None:
    """Runs the largest steps there can be, through the first layer alone, in this variant."""
    cache, limits = config.cache, config.scheduler
    held = replace(
        model,
        architecture=replace(model.architecture, num_layers=1),
        images={v: model.images[v][:1] for v in {Variant.FULL, variant}},
        ladder=Ladder(steps_of([0], [variant] if variant is not Variant.FULL else []), 1),
    )
    sizes = held.sizes(cache.block_tokens)
    # Room for every request's last block, which need not be full.
    tokens = limits.max_num_batched_tokens + limits.max_num_seqs * cache.block_tokens
    plan = plan_memory(
        sizes, budget_for(sizes, 0, cache.min_run_bytes, tokens), 0, cache.min_run_bytes
    )
    variants = held.ladder.variants_at(len(held.ladder.steps))
    max_model_len = limits.max_model_len or model.architecture.max_position
    layout = Layout(plan, held.ladder, max_model_len, [plan.capacity(variants)], variants)
    largest_step(assemble(config, held, layout), limits)


def assemble(config: EngineConfig, model: LoadedModel, layout: Layout) -> DeviceParts:
    """Puts the images into an arena and connects the parts around it."""
    architecture, plan, variants = model.architecture, layout.plan, layout.variants
    device = model.device
    arena = Arena(plan, device)
    if plan.staging:
        device.pin(image.host for images in model.images.values() for image in images)
        old, new = plan.base_blocks[0], plan.base_blocks[-1]
        arena.copy_blocks({old: new} if old != new else {})  # loads the code while nobody waits
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
        cos_sin=rope_table(architecture, layout.max_model_len).to(device.location),
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
        swapper=Swapper(arena, plan, layers, pool, scheduler.move_blocks, device.link()),
        model=forward,
        runner=device.runner(forward, config.scheduler, architecture.eos_token_ids),
        cost_model=measured_costs(model),
    )


def measured_costs(model: LoadedModel) -> CostModel | None:
    """Of the times that were measured as the model is served."""
    costs = costs_of(model.costs, model.kernels, model.dtype, model.device)
    return None if costs is None else cost_model(costs)


def costs_of(
    measured: Sequence[DeviceCosts], kernels: Kernels, dtype: torch.dtype, device: Device
) -> DeviceCosts | None:
    """The times of this device with these kernels and this dtype, and as many threads as now."""
    here = device.name, kernels.name, device.num_threads, str(dtype).removeprefix("torch.")
    fitting = (c for c in measured if (c.device, c.kernels, c.threads, c.dtype) == here)
    return next(fitting, None)


def _hello(layout: Layout, model: LoadedModel) -> Hello:
    dtype, device = str(model.dtype).removeprefix("torch."), model.device
    return layout.hello(device.name, model.kernels.name, device.num_threads, dtype)


def _attention_shape(architecture: Architecture, block_tokens: int) -> AttentionShape:
    return AttentionShape(
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        block_tokens=block_tokens,
        norm_eps=architecture.norm_eps,
    )
