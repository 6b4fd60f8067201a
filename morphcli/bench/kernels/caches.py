"""KV caches of one layer, filled through the kernels, and the same keys and values for torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from morphserve.morphcli.bench.kernels.memory import copies_beyond_caches
from morphserve.morphcli.bench.kernels.random_values import bell
from morphserve.runtime.kernels import AttentionShape, BatchMeta, Kernels


@dataclass(frozen=True, slots=True)
class Filled:
    """So many sequences of one length, their caches so often that processor caches hold not all."""

    shape: AttentionShape
    context: int
    caches: list[Tensor]
    k: list[Tensor]  # bfloat16 [S, G, context, D]
    v: list[Tensor]


def fill(kernels: Kernels, shape: AttentionShape, sequences: int, context: int) -> Filled:
    heads, dim = shape.num_kv_heads, shape.head_dim
    dtype = kernels.weight_dtype(torch.bfloat16)
    k, v = (bell(sequences, context, heads, dim, seed=seed) for seed in (0, 1))
    meta = lay_out(shape, sequences, context, context)
    page = 2 * heads * dim * shape.block_tokens
    cache = torch.zeros(meta.block_table.numel(), page, dtype=dtype)
    queries = torch.zeros(sequences * context, shape.num_heads * dim)
    qkv = torch.cat((queries, k.view(len(queries), -1), v.view(len(queries), -1)), dim=1)
    qkv = qkv.to(kernels.activation_dtype(dtype))
    kernels.rope_write_kv(qkv, cache, meta, shape, unturned(context, dim), None)
    keys, values = (x.transpose(1, 2).bfloat16().contiguous() for x in (k, v))
    return Filled(
        shape,
        context,
        caches=copies_beyond_caches(cache),
        k=copies_beyond_caches(keys),
        v=copies_beyond_caches(values),
    )


def lay_out(shape: AttentionShape, sequences: int, context: int, new: int) -> BatchMeta:
    """Where the last `new` tokens of equal sequences lie; pages follow each other."""
    blocks = -(-context // shape.block_tokens)
    table = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    positions = torch.arange(context - new, context, dtype=torch.int32)
    return BatchMeta(
        positions=positions.repeat(sequences),
        token_page=table[:, (positions // shape.block_tokens).long()].flatten().contiguous(),
        token_slot=(positions % shape.block_tokens).repeat(sequences),
        query_start=torch.arange(0, (sequences + 1) * new, new, dtype=torch.int32),
        context_len=torch.full((sequences,), context, dtype=torch.int32),
        block_table=table,
    )


def unturned(positions: int, dim: int) -> Tensor:
    """A table of rotations by nothing: cosines of 1, sines of 0."""
    return torch.cat((torch.ones(positions, dim // 2), torch.zeros(positions, dim // 2)), dim=1)
