"""The forward pass of a Llama-family model, as functions over the layers' active images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morphserve.quantize.architecture import Architecture, inverse_frequencies
from morphserve.quantize.weights import StaticTensors
from morphserve.runtime.arena import Arena
from morphserve.runtime.kernels import AttentionShape, BatchMeta, FullLinear, Kernels
from morphserve.runtime.layers import LayerWeights
from morphserve.runtime.memory import align


@dataclass(frozen=True, slots=True)
class StaticWeights:
    """What is never swapped, at the start of the arena."""

    embedding: Tensor  # [vocab, hidden]
    norm: Tensor  # [hidden]
    head: FullLinear  # [vocab, hidden]


@dataclass(frozen=True, slots=True)
class PackedStatics:
    """The static tensors as they will lie in the arena."""

    embedding: Tensor
    norm: Tensor
    head: Tensor | None  # None: the embedding's bytes serve as the head too

    @property
    def num_bytes(self) -> int:
        tensors = [self.embedding, self.norm] + ([] if self.head is None else [self.head])
        return sum(align(t.numel() * t.element_size()) for t in tensors)


def pack_statics(static: StaticTensors, kernels: Kernels, dtype: torch.dtype) -> PackedStatics:
    embedding = static.embedding.to(dtype)
    tied = static.head is static.embedding
    source = embedding if tied else static.head.to(dtype)
    head = kernels.pack_full(source)
    shared = tied and head.data_ptr() == embedding.data_ptr()
    norm = static.norm.to(kernels.activation_dtype(dtype))
    return PackedStatics(embedding, norm, None if shared else head)


def place_statics(arena: Arena, packed: PackedStatics) -> StaticWeights:
    """Copies the static tensors to the arena's start and returns views of them."""
    offset = 0

    def place(tensor: Tensor) -> Tensor:
        nonlocal offset
        view = arena.view(offset, tensor.shape, tensor.dtype)
        view.copy_(tensor)
        offset = align(offset + tensor.numel() * tensor.element_size())
        return view

    embedding, norm = place(packed.embedding), place(packed.norm)
    head = embedding if packed.head is None else place(packed.head)
    return StaticWeights(embedding, norm, FullLinear(head, None))


def rope_table(architecture: Architecture, max_positions: int) -> Tensor:
    """[max_positions, head_dim] float32: cosines, then sines, of each pair of channels."""
    frequencies = inverse_frequencies(architecture.rope, architecture.head_dim)
    angles = torch.outer(torch.arange(max_positions).float(), torch.tensor(frequencies))
    return torch.cat((angles.cos(), angles.sin()), dim=1)


@dataclass(frozen=True, slots=True)
class Model:
    """Everything a forward pass reads; `layers` is changed by swaps, between two passes."""

    kernels: Kernels
    static: StaticWeights
    layers: Sequence[LayerWeights]
    caches: Sequence[Tensor]  # per layer, indexed by page0
    cos_sin: Tensor
    shape: AttentionShape

    def forward(self, tokens: Tensor, meta: BatchMeta, rows: Tensor) -> Tensor:
        """Token ids [M] to logits [len(rows), vocab] of the batch rows asked for."""
        kernels, eps = self.kernels, self.shape.norm_eps
        embedding = self.static.embedding
        residual = F.embedding(tokens, embedding).to(kernels.activation_dtype(embedding.dtype))
        norms = [layer.input_norm for layer in self.layers] + [self.static.norm]
        x = kernels.rms_norm(residual, norms[0], eps)
        for layer, cache, norm in zip(self.layers, self.caches, norms[1:], strict=True):
            q = self.before_attention(x, layer, cache, meta)
            x = kernels.attention(q, cache, meta, self.shape)
            x = self.after_attention(x, residual, layer, norm)
        return kernels.linear(x[rows], self.static.head)

    def before_attention(
        self, x: Tensor, layer: LayerWeights, cache: Tensor, meta: BatchMeta
    ) -> Tensor:
        """The layer's normed input to queries [M, H, D]; keys and values go into the cache."""
        qkv = self.kernels.linear(x, layer.qkv)
        norm = layer.qk_norm
        return self.kernels.rope_write_kv(qkv, cache, meta, self.shape, self.cos_sin, norm)

    def after_attention(
        self, x: Tensor, residual: Tensor, layer: LayerWeights, next_norm: Tensor
    ) -> Tensor:
        """Attention's output [M, H * D] to what follows the layer, normed; adds to `residual`."""
        kernels, eps = self.kernels, self.shape.norm_eps
        x = kernels.linear(x, layer.o)
        x = kernels.add_rms_norm(x, residual, layer.post_norm, eps)
        x = kernels.linear(kernels.silu_mul(kernels.linear(x, layer.gate_up)), layer.down)
        return kernels.add_rms_norm(x, residual, next_norm, eps)
