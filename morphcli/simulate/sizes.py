"""Models by their `config.json`: what their weights and KV cache take on a GPU."""

import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from morphserve.configs.errors import ConfigError
from morphserve.configs.schema import CacheConfig
from morphserve.quantize.architecture import Architecture, read_architecture
from morphserve.quantize.manifest import Variant
from morphserve.quantize.modules import linear_shapes, vector_shapes
from morphserve.runtime.memory import ModelSizes, align

GROUP = 128  # inputs that share a scale
_BITS = {Variant.INT4: 4, Variant.INT8: 8}
_SHIPPED = resources.files("morphserve.morphcli.simulate").joinpath("models")
_ITEM = 2  # bytes of a full-precision weight, a scale, or a number in the KV cache: 16 bits


def known_models() -> list[str]:
    """Names of the models whose `config.json` ships."""
    return sorted(entry.name.removesuffix(".json") for entry in _SHIPPED.iterdir())


def find_model(name: str) -> Architecture:
    """Of a name as `llama-3-8b`, a `config.json`, or a folder that has one."""
    path = Path(name).expanduser()
    shipped = _SHIPPED.joinpath(f"{name.lower()}.json")
    file: Traversable = path / "config.json" if path.is_dir() else path
    if name.lower() in known_models():
        file = shipped
    elif not file.is_file():
        raise ConfigError(
            f"model {name!r} is not known: use {', '.join(known_models())}, or a folder with a "
            "config.json"
        )
    try:
        return read_architecture(json.loads(file.read_text("utf-8")), {})
    except KeyError as error:
        raise ConfigError(f"{file} lacks {error}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be used: {error}") from error


def layer_weights(arch: Architecture) -> int:
    """Weights in one layer's linears."""
    return sum(n * k for n, k in linear_shapes(arch).values())


def model_sizes(arch: Architecture, *, int8: bool = False, shards: int = 1) -> ModelSizes:
    """Bytes on each of `shards` devices that hold equal parts; 16 bits at full precision."""
    variants = [Variant.FULL, *([Variant.INT8] if int8 else []), Variant.INT4]
    images = {variant: align(layer_bytes(arch, variant) // shards) for variant in variants}
    return ModelSizes(
        static_bytes=align(_static_bytes(arch) // shards),
        image_bytes={variant: (size,) * arch.num_layers for variant, size in images.items()},
        kv_bytes_per_token=2 * arch.kv_size * _ITEM // shards,
        block_tokens=CacheConfig().block_tokens,
    )


def layer_bytes(arch: Architecture, variant: Variant) -> int:
    """A layer's image: linears, norms and biases; symmetric groups of 128 if quantised."""
    vectors = sum(align(size * _ITEM) for (size,) in vector_shapes(arch).values())
    return vectors + sum(_linear_bytes(n, k, variant) for n, k in linear_shapes(arch).values())


def _linear_bytes(outputs: int, inputs: int, variant: Variant) -> int:
    if variant is Variant.FULL:
        return align(outputs * inputs * _ITEM)
    scales = outputs * -(-inputs // GROUP) * _ITEM
    return align(outputs * inputs * _BITS[variant] // 8) + align(scales)


def _static_bytes(arch: Architecture) -> int:
    matrices = 1 if arch.tied_head else 2
    return matrices * arch.vocab_size * arch.hidden_size * _ITEM + align(arch.hidden_size * _ITEM)
