"""Engines to be timed, one per variant: every layer of it at once, in memory of its own."""

from dataclasses import dataclass, replace

import torch

from morphserve.configs.load import load_policy
from morphserve.configs.schema import EngineConfig, SchedulerConfig
from morphserve.quantize.bundle import Bundle
from morphserve.quantize.checkpoint import Checkpoint
from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import DeviceParts, assemble
from morphserve.runtime.device import Device
from morphserve.runtime.kernels import Kernels
from morphserve.runtime.ladder import Ladder, steps_of
from morphserve.runtime.layers import full_image, quantized_image
from morphserve.runtime.layout import Layout
from morphserve.runtime.loader import LoadedModel
from morphserve.runtime.memory import budget_for, plan_memory
from morphserve.runtime.model import pack_statics

LAYER_BYTES = 512 * 2**20  # of full images that are loaded: more than caches hold


@dataclass(frozen=True, slots=True)
class Rig:
    """An engine's parts with all layers of one variant; a large model's first layers only."""

    parts: DeviceParts
    image_bytes: int  # of its first layer


def build_rigs(
    checkpoint: Checkpoint,
    bundle: Bundle,
    kernels: Kernels,
    dtype: torch.dtype,
    limits: SchedulerConfig,
    num_tokens: int,
    device: Device,
) -> dict[Variant, Rig]:
    """Full precision and each variant of the bundle, with a KV cache of at least `num_tokens`."""
    arch = checkpoint.architecture
    full = [full_image(checkpoint.layer(0), kernels, dtype)]
    count = min(arch.num_layers, max(2, LAYER_BYTES // full[0].num_bytes))
    full += [full_image(checkpoint.layer(i), kernels, dtype) for i in range(1, count)]
    model = LoadedModel(
        architecture=replace(arch, num_layers=count),
        kernels=kernels,
        dtype=dtype,
        statics=pack_statics(checkpoint.static(), kernels, dtype),
        images={Variant.FULL: full},
        ladder=Ladder((), count),
        device=device,
    )
    rigs = {Variant.FULL: Rig(assemble_filled(model, "off", limits, num_tokens), full[0].num_bytes)}
    for variant in bundle.manifest.variants:
        layers = (bundle.layer(i, variant) for i in range(count))
        images = [quantized_image(layer, kernels, dtype) for layer in layers]
        held = replace(
            model,
            images={Variant.FULL: full, variant: images},
            ladder=Ladder(steps_of(range(count), [variant]), count),
        )
        parts = assemble_filled(held, "static:all", limits, num_tokens)
        rigs[variant] = Rig(parts, images[0].num_bytes)
    return rigs


def assemble_filled(
    model: LoadedModel, policy: str, limits: SchedulerConfig, num_tokens: int
) -> DeviceParts:
    """An engine's parts that hold so many tokens of KV cache, every page of it written."""
    left_to_device = frozenset({"block_tokens", "min_run_bytes"})
    config = EngineConfig("", load_policy(policy), scheduler=limits, unset=left_to_device)
    config = config.settled(model.device.defaults)
    cache, sizes = config.cache, model.sizes(config.cache.block_tokens)
    budget = budget_for(sizes, 0, cache.min_run_bytes, num_tokens)
    plan = plan_memory(sizes, budget, 0, cache.min_run_bytes)
    variants = model.ladder.variants_at(len(model.ladder.steps))
    max_model_len = limits.max_model_len or model.architecture.max_position
    layout = Layout(plan, model.ladder, max_model_len, [plan.capacity(variants)], variants)
    parts = assemble(config, model, layout)
    # Pages that nobody wrote would all be read from one page of zeros.
    blocks = parts.pool.allocate(parts.pool.num_free)
    for layer in parts.model.caches:
        layer[blocks] = torch.randn(layer.shape[1]).to(layer)
    parts.pool.free(blocks)
    return parts
