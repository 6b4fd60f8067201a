"""A checkpoint and its bundle, read into host memory in the layout that the kernels want."""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from morphserve.configs.errors import ConfigError, UnsupportedModel
from morphserve.configs.schema import EngineConfig
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.bundle import Bundle, open_bundle
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.costs import DeviceCosts
from morphserve.quantize.manifest import Variant
from morphserve.runtime.device import Device, open_device
from morphserve.runtime.kernels import Kernels, load_kernels
from morphserve.runtime.ladder import Ladder, steps_of
from morphserve.runtime.layers import Image, full_image, quantized_image
from morphserve.runtime.memory import ModelSizes
from morphserve.runtime.model import StaticWeights, pack_statics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint and its bundle in host memory, in the kernels' layout."""

    architecture: Architecture
    kernels: Kernels
    dtype: torch.dtype  # of full-precision weights and of the KV cache
    statics: StaticWeights
    images: dict[Variant, list[Image]]  # of each layer, by variant that is served; FULL always
    ladder: Ladder
    costs: Sequence[DeviceCosts] = ()  # measured times in the bundle, of any device
    load_s: Mapping[str, float] = field(default_factory=dict)  # kernels, checkpoint, bundle
    device: Device = field(default_factory=lambda: open_device("cpu"))  # that it is served on

    def sizes(self, block_tokens: int) -> ModelSizes:
        return ModelSizes(
            static_bytes=self.statics.num_bytes,
            image_bytes={
                variant: tuple(image.num_bytes for image in images)
                for variant, images in self.images.items()
            },
            kv_bytes_per_token=2 * self.architecture.kv_size * self.dtype.itemsize,
            block_tokens=block_tokens,
        )


def load_model(
    config: EngineConfig,
    open_checkpoint: Callable[[str], Checkpoint] = open_checkpoint,
    open_bundle: Callable[[str, Checkpoint], Bundle] = open_bundle,
) -> LoadedModel:
    """Reads checkpoint and bundle, layer by layer, into images."""
    started = time.monotonic()
    checkpoint = open_checkpoint(config.model)
    architecture = checkpoint.architecture
    swaps = config.policy.max_demoted(architecture.num_layers) > 0
    if config.bundle is None and swaps:
        raise ConfigError(
            f"policy {config.policy.name} swaps layers and needs a bundle: make one with "
            f"`morph quantize {config.model} --output DIR`, or serve with --policy off"
        )
    opened = time.monotonic()
    device = open_device(config.device)
    kernels = _load_kernels(config.kernels, device)
    ready = time.monotonic()
    _require_head_dim(architecture, kernels)
    dtype = choose_dtype(config.dtype, architecture.dtype, kernels)
    warn_of_float32(device.kind, dtype)
    layers = range(architecture.num_layers)
    statics = pack_statics(checkpoint.static(), kernels, dtype)
    images = {Variant.FULL: [full_image(checkpoint.layer(i), kernels, dtype) for i in layers]}
    read = time.monotonic()
    # After the checkpoint was read: its tensors are hashed by then, for the bundle to compare.
    bundle = None if config.bundle is None else open_bundle(config.bundle, checkpoint)
    ladder = served_ladder(config, architecture.num_layers, bundle)
    if bundle and swaps:
        for variant in {step.to for step in ladder.steps}:
            quantized = (bundle.layer(i, variant) for i in layers)
            images[variant] = [quantized_image(layer, kernels, dtype) for layer in quantized]
    return LoadedModel(
        architecture=architecture,
        kernels=kernels,
        dtype=dtype,
        statics=statics,
        images=images,
        ladder=ladder,
        costs=bundle.manifest.costs if bundle else (),
        device=device,
        load_s={
            "kernels": ready - opened,
            "checkpoint": opened - started + read - ready,
            "bundle": time.monotonic() - read,
        },
    )


def _load_kernels(name: str, device: Device) -> Kernels:
    if name not in ("auto", "reference"):
        hint = "; --device cpu has the CPU compute" if name == "cpu" else ""
        raise ConfigError(f"there are no kernels {name!r}: use auto or reference{hint}")
    return load_kernels(device.kind if name == "auto" else name)


def _require_head_dim(architecture: Architecture, kernels: Kernels) -> None:
    if architecture.head_dim > kernels.max_head_dim:
        raise UnsupportedModel(
            f"heads of {architecture.head_dim} channels are not supported by the "
            f"{kernels.name} kernels: at most {kernels.max_head_dim}"
        )


def choose_dtype(asked: str, checkpoint: str, kernels: Kernels) -> torch.dtype:
    """Of weights and KV: what was asked for, or what the kernels make of the checkpoint's."""
    if checkpoint not in ("float32", "bfloat16", "float16"):
        raise UnsupportedModel(f"config.json says dtype {checkpoint!r}: only floats are served")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if asked == "auto":
        return kernels.weight_dtype(dtypes[checkpoint])
    if asked not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype {asked!r} is not known: use auto, float32 or bfloat16")
    return dtypes[asked]


def warn_of_float32(kind: str, dtype: torch.dtype) -> None:
    """Says in the log if a GPU is to compute without what makes it fast."""
    if kind == "cuda" and dtype is torch.float32:
        logger.warning(
            "float32 on a GPU takes twice the memory, uses no tensor cores, and dequantises "
            "layers for every product: --dtype bfloat16 is many times faster, and rounds a "
            "float32 or float16 checkpoint to 8 significant bits"
        )


def served_ladder(config: EngineConfig, num_layers: int, bundle: Bundle | None) -> Ladder:
    """Through INT8 to INT4 where the bundle has both; policies that never swap know INT4 only."""
    order = layer_order(config, num_layers, bundle)
    manifest = bundle.manifest if bundle else None
    if (
        manifest is None
        or config.policy.static_layers >= 0
        or Variant.INT8 not in manifest.variants
    ):
        return Ladder(steps_of(order, [Variant.INT4]), num_layers)
    if config.order == "bundle" and manifest.ranking and manifest.ranking.ladder:
        return Ladder(tuple(manifest.ranking.ladder.rungs), num_layers)
    return Ladder(steps_of(order, [Variant.INT8, Variant.INT4]), num_layers)


def layer_order(config: EngineConfig, num_layers: int, bundle: Bundle | None) -> list[int]:
    """In which order layers are demoted."""
    layers = list(range(num_layers))
    match config.order:
        case "bundle":
            return layers if bundle is None else list(bundle.order)
        case "front-to-back":
            return layers
        case "back-to-front":
            return layers[::-1]
        case "random":
            random.Random(config.seed).shuffle(layers)
            return layers
    raise ConfigError(
        f"--order {config.order!r} is not known: use bundle, front-to-back, back-to-front or random"
    )
