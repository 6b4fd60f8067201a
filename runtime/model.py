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
        x = kernels.rms_norm(residual, self.layers[0].input_norm, eps)
        next_norms = [layer.input_norm for layer in self.layers[1:]] + [self.static.norm]
        for layer, cache, norm in zip(self.layers, self.caches, next_norms, strict=True):
            x = self._attention(x, layer, cache, meta)
            x = kernels.add_rms_norm(x, residual, layer.post_norm, eps)
            x = kernels.linear(kernels.silu_mul(kernels.linear(x, layer.gate_up)), layer.down)
            x = kernels.add_rms_norm(x, residual, norm, eps)
        return kernels.linear(x[rows], self.static.head)

    def _attention(self, x: Tensor, layer: LayerWeights, cache: Tensor, meta: BatchMeta) -> Tensor:
        qkv = self.kernels.linear(x, layer.qkv)
        q = self.kernels.rope_write_kv(qkv, cache, meta, self.shape, self.cos_sin, layer.qk_norm)
        return self.kernels.linear(self.kernels.attention(q, cache, meta, self.shape), layer.o)
