"""Batches over scrambled pages and quantised weights, for kernel tests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import AttentionShape, BatchMeta
from morphserve.runtime.kernels.reference import split_pages


def scatter_pages(contexts: Sequence[int], block_tokens: int) -> list[Tensor]:
    """Pages of each sequence, int32, in an order that neighbours neither time nor sequence."""
    counts = [-(-context // block_tokens) for context in contexts]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(7))
    return list(torch.split(order.int(), counts))


def make_meta(
    contexts: Sequence[int], new: Sequence[int], pages: Sequence[Tensor], block_tokens: int
) -> BatchMeta:
    """A step in which sequence i computes its last `new[i]` of `contexts[i]` tokens."""
    spans = [torch.arange(c - n, c, dtype=torch.int32) for c, n in zip(contexts, new, strict=True)]
    table = torch.full((len(pages), max(map(len, pages)) + 1), 999_999, dtype=torch.int32)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    blocks = [own[(span // block_tokens).long()] for span, own in zip(spans, pages, strict=True)]
    positions = torch.cat(spans)
    return BatchMeta(
        positions=positions,
        token_page=torch.cat(blocks),
        token_slot=positions % block_tokens,
        query_start=torch.tensor([0, *new]).cumsum(0).int(),
        context_len=torch.tensor(contexts, dtype=torch.int32),
        block_table=table,
    )


def page_items(shape: AttentionShape) -> int:
    return 2 * shape.num_kv_heads * shape.head_dim * shape.block_tokens


def cpu_pages(cache: Tensor, shape: AttentionShape) -> Tensor:
    """The reference's pages in the layout of the C kernels (runtime/kernels/pages.h)."""
    if cache.dtype != torch.bfloat16:
        return cache
    k, v = split_pages(cache, shape)
    pairs = k.unflatten(2, (-1, 2)).transpose(3, 4)  # [pages, G, D / 2, B, 2]
    even = shape.block_tokens // 2 * 2
    near = v[:, :, :even].unflatten(2, (-1, 2)).transpose(3, 4)  # [pages, G, B / 2, D, 2]
    values = torch.cat([near.flatten(2), v[:, :, even:].flatten(2)], dim=2)
    return torch.cat([pairs.flatten(1), values.flatten(1)], dim=1)


def cuda_pages(cache: Tensor, shape: AttentionShape) -> Tensor:
    """The reference's pages in the layout of the CUDA kernels: K [G, B, D], then V [G, B, D]."""
    k, v = split_pages(cache, shape)
    return torch.cat([k.transpose(2, 3).flatten(1), v.flatten(1)], dim=1)


def rotations(num_positions: int, head_dim: int) -> Tensor:
    """[num_positions, head_dim]: cosines, then sines, of random angles."""
    angles = torch.rand(num_positions, head_dim // 2) * 6.28
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def random_weight(
    n: int, k: int, group: int, bits: int = 4, zeros: bool = False, ordered: bool = False
) -> QuantizedWeight:
    """Random codes, zeros and order; scales of ordinary size, subnormal in float16, and 0."""
    scales = torch.randn(n, k // group) * 0.02
    scales *= torch.tensor([0.0, 1e-6, 1.0, 1.0, 1.0])[torch.randint(0, 5, scales.shape)]
    return QuantizedWeight(
        codes=torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8),
        scales=scales.half(),
        group_size=group,
        bits=bits,
        zeros=torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8) if zeros else None,
        input_order=torch.randperm(k) if ordered else None,
    )
