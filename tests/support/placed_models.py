"""Tiny models for any kernels on any device, without an arena, and batches for them."""

import dataclasses
from collections.abc import Sequence

import torch
from kernel_batches import make_meta, page_items, scatter_pages
from swap_driver import ARCHITECTURE, quantised_layers, random_model
from torch import Tensor

from morphserve.quantize.architecture import Architecture
from morphserve.quantize.weights import StaticTensors
from morphserve.runtime.kernels import AttentionShape, BatchMeta, Kernels, LayerWeights
from morphserve.runtime.layers import Image, full_image, quantized_image, weights_at
from morphserve.runtime.model import Model, StaticWeights, pack_statics, rope_table

BLOCK_TOKENS = 8


class _Memory:
    """An image's bytes on the device, for `weights_at`."""

    def __init__(self, image: Image, device: str) -> None:
        self._bytes = image.host.to(device)

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape)
        return self._bytes[offset : offset + size.numel() * dtype.itemsize].view(dtype).view(size)


def _placed(image: Image, device: str) -> LayerWeights:
    return weights_at(_Memory(image, device), 0, image)


def shape_of(architecture: Architecture) -> AttentionShape:
    sizes = (architecture.num_heads, architecture.num_kv_heads, architecture.head_dim)
    return AttentionShape(*sizes, BLOCK_TOKENS, architecture.norm_eps)


def place_model(
    kernels: Kernels,
    architecture: Architecture,
    static: StaticTensors,
    images: Sequence[Image],
    dtype: torch.dtype,
    device: str,
) -> Model:
    """With caches of 8 blocks of which every item that was not written shows."""
    shape = shape_of(architecture)
    packed = pack_statics(static, kernels, dtype)
    embedding, head = (
        dataclasses.replace(table, weight=table.weight.to(device))
        for table in (packed.embedding, packed.head)
    )
    caches = [
        torch.full((8, page_items(shape)), torch.nan, dtype=dtype, device=device) for _ in images
    ]
    return Model(
        kernels=kernels,
        static=StaticWeights(embedding, packed.norm.to(device), head),
        layers=[_placed(image, device) for image in images],
        caches=caches,
        cos_sin=rope_table(architecture, 64).to(device),
        shape=shape,
    )


def small_model(
    kernels: Kernels, dtype: torch.dtype, device: str, quantised: bool = False
) -> Model:
    """Of random weights; two layers in full, or five quantised ones of all kinds."""
    static, layers = random_model()
    if quantised:
        images = [quantized_image(layer, kernels, dtype) for layer in quantised_layers()]
    else:
        images = [full_image(layer, kernels, dtype) for layer in layers[:2]]
    return place_model(kernels, ARCHITECTURE, static, images, dtype, device)


def growing_batches(steps: Sequence[Sequence[int]], device: str) -> list[tuple[Tensor, BatchMeta]]:
    """Token ids and places of each step, of sequences that grow."""
    pages = scatter_pages([sum(lengths) for lengths in zip(*steps, strict=True)], BLOCK_TOKENS)
    contexts = [0] * len(steps[0])
    generator = torch.Generator().manual_seed(3)
    batches = []
    for new in steps:
        contexts = [before + n for before, n in zip(contexts, new, strict=True)]
        meta = make_meta(contexts, new, pages, BLOCK_TOKENS)
        tokens = torch.randint(0, ARCHITECTURE.vocab_size, (sum(new),), generator=generator)
        batches.append((tokens.to(device), on_device(device, meta)))
    return batches


def on_device(device: str, meta: BatchMeta) -> BatchMeta:
    fields = dataclasses.fields(meta)
    return BatchMeta(**{field.name: getattr(meta, field.name).to(device) for field in fields})
