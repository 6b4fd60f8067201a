"""The forward pass in plain float32 over whole sequences, one decoder layer at a time.

Offline work (calibration, profiles, perplexity) uses it: no cache, no batch state, no kernels.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from morphserve.quantize.architecture import Architecture, inverse_frequencies
from morphserve.quantize.rounding import dequantize
from morphserve.quantize.weights import (
    Biases,
    LayerTensors,
    Norms,
    QuantizedWeight,
    StaticTensors,
    Weight,
)

Linear = Literal["qkv", "o", "gate_up", "down"]  # fields of LayerTensors
LINEARS: tuple[Linear, ...] = ("qkv", "o", "gate_up", "down")  # as the forward pass meets them
OnInput = Callable[[Linear, Tensor], None]  # told each linear's input, [n, length, inputs]


def to_float32(layer: LayerTensors[Tensor], device: str = "cpu") -> LayerTensors[Tensor]:
    """The same layer in float32."""

    def convert(weight: Tensor) -> Tensor:
        return weight.to(device, torch.float32)

    return _convert(layer, convert, device)


def quantized_to_float32(
    layer: LayerTensors[QuantizedWeight], device: str = "cpu"
) -> LayerTensors[Tensor]:
    """The layer that a quantised variant stands for, in float32."""

    def convert(weight: QuantizedWeight) -> Tensor:
        return dequantize(weight).to(device)

    return _convert(layer, convert, device)


def _convert(
    layer: LayerTensors[Weight], convert: Callable[[Weight], Tensor], device: str
) -> LayerTensors[Tensor]:
    def vector(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, torch.float32)

    norms, biases = layer.norms, layer.biases
    return LayerTensors(
        norms=Norms(
            norms.input.to(device, torch.float32),
            norms.post_attention.to(device, torch.float32),
            vector(norms.q),
            vector(norms.k),
        ),
        biases=Biases(
            vector(biases.qkv), vector(biases.o), vector(biases.gate_up), vector(biases.down)
        ),
        qkv=convert(layer.qkv),
        o=convert(layer.o),
        gate_up=convert(layer.gate_up),
        down=convert(layer.down),
    )


def rotation(arch: Architecture, length: int) -> Tensor:
    """Cosines and sines of positions 0..length-1, [2, length, head_dim / 2]."""
    frequencies = torch.tensor(inverse_frequencies(arch.rope, arch.head_dim), dtype=torch.float32)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def embed(static: StaticTensors, tokens: Tensor) -> Tensor:
    """[n, length] token ids to [n, length, hidden] float32."""
    return F.embedding(tokens, static.embedding).float()


def decoder_layer(
    x: Tensor,
    layer: LayerTensors[Tensor],
    arch: Architecture,
    cos_sin: Tensor,
    on_input: OnInput = lambda _linear, _x: None,
) -> Tensor:
    """[n, length, hidden] through one float32 decoder layer; each row starts at position 0."""
    q, k, v = project(x, layer, arch, cos_sin, on_input)
    return finish(x, attend(q, k, v), layer, arch, on_input)


def logits(x: Tensor, static: StaticTensors, arch: Architecture) -> Tensor:
    """[..., hidden] behind the last layer to [..., vocab]."""
    return F.linear(_rms_norm(x, static.norm.float(), arch.norm_eps), static.head.float())


def project(
    x: Tensor,
    layer: LayerTensors[Tensor],
    arch: Architecture,
    cos_sin: Tensor,
    on_input: OnInput = lambda _linear, _x: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of [n, length, hidden], each [n, its heads, length, head_dim]."""
    n, length, _ = x.shape
    x = qkv_input(x, layer, arch)
    on_input("qkv", x)
    qkv = F.linear(x, layer.qkv, layer.biases.qkv)
    q, k, v = (
        part.view(n, length, -1, arch.head_dim).transpose(1, 2)
        for part in torch.split(qkv, [arch.q_size, arch.kv_size, arch.kv_size], dim=-1)
    )
    if layer.norms.q is not None and layer.norms.k is not None:
        q = _rms_norm(q, layer.norms.q, arch.norm_eps)
        k = _rms_norm(k, layer.norms.k, arch.norm_eps)
    return _rotate(q, cos_sin), _rotate(k, cos_sin), v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of what `project` returns, [n, length, heads * head_dim]."""
    n, num_heads, length, _ = q.shape
    repeats = num_heads // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).reshape(n, length, -1)


def finish(
    x: Tensor,
    attended: Tensor,
    layer: LayerTensors[Tensor],
    arch: Architecture,
    on_input: OnInput = lambda _linear, _x: None,
) -> Tensor:
    """The layer's output from its input and what `attend` returns."""
    on_input("o", attended)
    x = behind_attention(x, attended, layer)
    entering = gate_up_input(x, layer, arch)
    on_input("gate_up", entering)
    gated = down_input(entering, layer)
    on_input("down", gated)
    return x + F.linear(gated, layer.down, layer.biases.down)


def qkv_input(x: Tensor, layer: LayerTensors[Tensor], arch: Architecture) -> Tensor:
    """What enters qkv, from the layer's input."""
    return _rms_norm(x, layer.norms.input, arch.norm_eps)


def behind_attention(x: Tensor, attended: Tensor, layer: LayerTensors[Tensor]) -> Tensor:
    """The hidden states between attention and MLP, from the layer's input and what enters o."""
    return x + F.linear(attended, layer.o, layer.biases.o)


def gate_up_input(x: Tensor, layer: LayerTensors[Tensor], arch: Architecture) -> Tensor:
    """What enters gate and up, from the hidden states behind attention."""
    return _rms_norm(x, layer.norms.post_attention, arch.norm_eps)


def down_input(x: Tensor, layer: LayerTensors[Tensor]) -> Tensor:
    """What enters down, from what enters gate and up."""
    gate, up = F.linear(x, layer.gate_up, layer.biases.gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates channel pairs (i, i + head_dim / 2) of [n, heads, length, head_dim]."""
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
