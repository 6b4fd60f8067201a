"""Models of random weights, straight in memory: how fast they are depends on no value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from morphserve.configs.schema import SchedulerConfig
from morphserve.morphcli.bench.kernels.random_values import bell, random_codes
from morphserve.quantize.architecture import Architecture, read_architecture
from morphserve.quantize.build import default_group_size
from morphserve.quantize.manifest import Variant
from morphserve.quantize.modules import linear_shapes
from morphserve.quantize.weights import Biases, LayerTensors, Norms, QuantizedWeight, StaticTensors
from morphserve.runtime.build import DeviceParts
from morphserve.runtime.kernels import Kernels
from morphserve.runtime.ladder import Ladder, steps_of
from morphserve.runtime.layers import full_image, quantized_image
from morphserve.runtime.loader import LoadedModel
from morphserve.runtime.model import pack_statics
from morphserve.runtime.rigs import assemble_filled

SPREAD = 0.02  # standard deviation of weights: logits stay finite


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model, as its `config.json` would have them."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    def architecture(self, max_position: int) -> Architecture:
        config = {
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": max_position,
            "dtype": "bfloat16",
        }
        return read_architecture(config, {})


def build_variants(
    shape: Shape, kernels: Kernels, sequences: int, context: int
) -> Mapping[Variant, DeviceParts]:
    """An engine's parts with all layers at full precision, and others with all at INT4.

    One layer's weights are made, and lie in the arena once per layer: caches gain nothing by it.
    """
    arch = shape.architecture(context + 1)
    dtype = kernels.weight_dtype(torch.bfloat16)
    full = full_image(_full(arch), kernels, dtype)
    int4 = quantized_image(_int4(arch), kernels, dtype)
    layers = range(arch.num_layers)
    model = LoadedModel(
        architecture=arch,
        kernels=kernels,
        dtype=dtype,
        statics=pack_statics(_statics(arch), kernels, dtype),
        images={Variant.FULL: [full for _ in layers]},
        ladder=Ladder((), arch.num_layers),
    )
    quantized = replace(
        model,
        images={**model.images, Variant.INT4: [int4 for _ in layers]},
        ladder=Ladder(steps_of(layers, [Variant.INT4]), arch.num_layers),
    )
    limits = SchedulerConfig(sequences, max(sequences, context), context + 1)
    tokens = sequences * (context + 16)
    return {
        Variant.FULL: assemble_filled(model, "off", limits, tokens),
        Variant.INT4: assemble_filled(quantized, "static:all", limits, tokens),
    }


def memory_need(shape: Shape, sequences: int, context: int) -> int:
    """Bytes that the arenas of both variants take, each with slabs for full precision."""
    arch = shape.architecture(context + 1)
    weights = arch.num_layers * layer_weights(arch) + 2 * arch.vocab_size * arch.hidden_size
    kv = 4 * arch.kv_size * arch.num_layers * sequences * (context + 16)
    return 2 * (2 * weights + kv)


def layer_weights(arch: Architecture) -> int:
    return sum(outputs * inputs for outputs, inputs in linear_shapes(arch).values())


def _linears(arch: Architecture) -> dict[str, tuple[int, int]]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    return {
        "qkv": (arch.q_size + 2 * arch.kv_size, hidden),
        "o": (hidden, arch.q_size),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def _full(arch: Architecture) -> LayerTensors[torch.Tensor]:
    weights = {name: SPREAD * bell(*size, seed=0) for name, size in _linears(arch).items()}
    return LayerTensors(_norms(arch), Biases(), **weights)


def _int4(arch: Architecture) -> LayerTensors[QuantizedWeight]:
    group = default_group_size(arch)
    weights = {
        name: random_codes(*size, bits=4, group=group, spread=SPREAD)
        for name, size in _linears(arch).items()
    }
    return LayerTensors(_norms(arch), Biases(), **weights)


def _norms(arch: Architecture) -> Norms:
    return Norms(torch.ones(arch.hidden_size), torch.ones(arch.hidden_size))


def _statics(arch: Architecture) -> StaticTensors:
    size = arch.vocab_size, arch.hidden_size
    embedding = bell(*size, seed=1, dtype=torch.bfloat16)
    head = embedding if arch.tied_head else SPREAD * bell(*size, seed=2, dtype=torch.bfloat16)
    return StaticTensors(embedding, torch.ones(arch.hidden_size), head)
