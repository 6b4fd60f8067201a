"""What a forward pass of a Llama-family model reads: static weights, the RoPE table, layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from morphserve.quantize.architecture import Architecture, inverse_frequencies
from morphserve.quantize.weights import StaticTensors
from morphserve.runtime.arena import Arena
from morphserve.runtime.kernels import (
    AttentionShape,
    BatchMeta,
    FullLinear,
    Kernels,
    LayerWeights,
)
from morphserve.runtime.memory import align


@dataclass(frozen=True, slots=True)
class StaticWeights:
    """What is never swapped: as packed on the host, and at the start of the arena."""

    embedding: FullLinear  # [vocab, hidden]
    norm: Tensor  # [hidden]
    head: FullLinear  # the embedding itself where the two are tied

    @property
    def num_bytes(self) -> int:
        return sum(align(tensor.nbytes) for tensor in self._tensors)

    @property
    def _tensors(self) -> list[Tensor]:
        head = [] if self.head is self.embedding else [self.head.weight]
        return [self.embedding.weight, self.norm, *head]


def pack_statics(static: StaticTensors, kernels: Kernels, dtype: torch.dtype) -> StaticWeights:
    embedding = kernels.pack_full(static.embedding.to(dtype))
    tied = static.head is static.embedding
    head = embedding if tied else kernels.pack_full(static.head.to(dtype))
    return StaticWeights(embedding, static.norm.to(kernels.activation_dtype(dtype)), head)


def place_statics(arena: Arena, packed: StaticWeights) -> StaticWeights:
    """Copies the static tensors to the arena's start and returns views of them."""
    offset = 0

    def place(tensor: Tensor) -> Tensor:
        nonlocal offset
        view = arena.view(offset, tensor.shape, tensor.dtype)
        view.copy_(tensor)
        offset = align(offset + tensor.nbytes)
        return view

    embedding = replace(packed.embedding, weight=place(packed.embedding.weight))
    norm = place(packed.norm)
    tied = packed.head is packed.embedding
    head = embedding if tied else replace(packed.head, weight=place(packed.head.weight))
    return StaticWeights(embedding, norm, head)


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
        """Token ids [M] to logits [len(rows), vocab] of the batch rows asked for, ascending."""
        static = self.static
        return self.kernels.forward(
            *(tokens, static.embedding, self.layers, self.caches, meta, self.shape, self.cos_sin),
            *(rows, static.norm, static.head),
        )
