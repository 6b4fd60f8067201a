"""The forward pass in plain float32 over whole sequences, one decoder layer at a time.

Offline work (calibration, profiles, perplexity) uses it: no cache, no batch state, no kernels.
"""

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
)


def to_float32(layer: LayerTensors[Tensor]) -> LayerTensors[Tensor]:
    """The same layer in float32."""
    return LayerTensors(
        norms=_norms_to_float32(layer.norms),
        biases=_biases_to_float32(layer.biases),
        qkv=layer.qkv.float(),
        o=layer.o.float(),
        gate_up=layer.gate_up.float(),
        down=layer.down.float(),
    )


def quantized_to_float32(layer: LayerTensors[QuantizedWeight]) -> LayerTensors[Tensor]:
    """The layer that a quantised variant stands for, in float32."""
    return LayerTensors(
        norms=_norms_to_float32(layer.norms),
        biases=_biases_to_float32(layer.biases),
        qkv=dequantize(layer.qkv),
        o=dequantize(layer.o),
        gate_up=dequantize(layer.gate_up),
        down=dequantize(layer.down),
    )


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _norms_to_float32(norms: Norms) -> Norms:
    return Norms(
        norms.input.float(), norms.post_attention.float(), _float(norms.q), _float(norms.k)
    )


def _biases_to_float32(biases: Biases) -> Biases:
    return Biases(_float(biases.qkv), _float(biases.o), _float(biases.gate_up), _float(biases.down))


def rotation(arch: Architecture, length: int) -> Tensor:
    """Cosines and sines of positions 0..length-1, [2, length, head_dim / 2]."""
    frequencies = torch.tensor(inverse_frequencies(arch.rope, arch.head_dim), dtype=torch.float32)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def embed(static: StaticTensors, tokens: Tensor) -> Tensor:
    """[n, length] token ids to [n, length, hidden] float32."""
    return F.embedding(tokens, static.embedding).float()


def decoder_layer(
    x: Tensor, layer: LayerTensors[Tensor], arch: Architecture, cos_sin: Tensor
) -> Tensor:
    """[n, length, hidden] through one float32 decoder layer; each row starts at position 0."""
    x = x + _attention(_rms_norm(x, layer.norms.input, arch.norm_eps), layer, arch, cos_sin)
    return x + _mlp(_rms_norm(x, layer.norms.post_attention, arch.norm_eps), layer)


def logits(x: Tensor, static: StaticTensors, arch: Architecture) -> Tensor:
    """[..., hidden] behind the last layer to [..., vocab]."""
    return F.linear(_rms_norm(x, static.norm.float(), arch.norm_eps), static.head.float())


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _attention(
    x: Tensor, layer: LayerTensors[Tensor], arch: Architecture, cos_sin: Tensor
) -> Tensor:
    n, length, _ = x.shape
    qkv = F.linear(x, layer.qkv, layer.biases.qkv)
    q, k, v = (
        part.view(n, length, -1, arch.head_dim).transpose(1, 2)
        for part in torch.split(qkv, [arch.q_size, arch.kv_size, arch.kv_size], dim=-1)
    )
    if layer.norms.q is not None and layer.norms.k is not None:
        q = _rms_norm(q, layer.norms.q, arch.norm_eps)
        k = _rms_norm(k, layer.norms.k, arch.norm_eps)
    q, k = _rotate(q, cos_sin), _rotate(k, cos_sin)
    repeats = arch.num_heads // arch.num_kv_heads
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(mixed.transpose(1, 2).reshape(n, length, -1), layer.o, layer.biases.o)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates channel pairs (i, i + head_dim / 2) of [n, heads, length, head_dim]."""
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _mlp(x: Tensor, layer: LayerTensors[Tensor]) -> Tensor:
    gate, up = F.linear(x, layer.gate_up, layer.biases.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down, layer.biases.down)
