"""KV caches as the arena cuts them up, and batches whose blocks lie anywhere in them."""

from dataclasses import dataclass

import torch
from bench import Bench
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta


@dataclass(frozen=True, slots=True)
class Caches:
    """Chunks of `run` blocks of all layers, layer-major, as in runtime/memory.py."""

    pages: Tensor  # [pages, 2 * G * B * D], all written
    run: int
    num_layers: int

    def layer(self, index: int) -> Tensor:
        return self.pages[index * self.run :]

    @property
    def blocks(self) -> Tensor:
        """int32 page0 of every block, in random order: as after hours of coming and going."""
        chunk = self.run * self.num_layers
        starts = torch.arange(0, len(self.pages) - chunk + 1, chunk, device=self.pages.device)
        blocks = (starts[:, None] + torch.arange(self.run, device=self.pages.device)).flatten()
        return blocks[torch.randperm(len(blocks), device=blocks.device)].int()


def attention_shape(bench: Bench, block_tokens: int | None = None) -> AttentionShape:
    arch = bench.sizes.architecture
    return AttentionShape(
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        block_tokens=block_tokens or bench.sizes.block_tokens,
        norm_eps=arch.norm_eps,
    )


def random_bytes(bench: Bench, num_tokens: int) -> Tensor:
    """bf16 numbers for the K and V of so many tokens in all layers, and some more."""
    arch = bench.sizes.architecture
    memory = torch.empty(
        2 * arch.kv_size * arch.num_layers * (num_tokens + num_tokens // 8 + 4096),
        dtype=torch.bfloat16,
        device=bench.device,
    )
    for part in memory.split(1 << 28):
        part.normal_()
    return memory


def cut(bench: Bench, memory: Tensor, run: int, block_tokens: int) -> Caches:
    """The same bytes as pages of so many tokens, in chunks of so many blocks."""
    arch = bench.sizes.architecture
    page = 2 * arch.kv_size * block_tokens
    return Caches(memory[: len(memory) // page * page].view(-1, page), run, arch.num_layers)


def meta_of(
    caches: Caches, num_seqs: int, context: int, block_tokens: int, queries: int = 1
) -> BatchMeta:
    """Equal sequences, of which the last `queries` tokens are in the batch."""
    device = caches.pages.device
    per_seq = -(-context // block_tokens)
    blocks = caches.blocks[: num_seqs * per_seq].view(num_seqs, per_seq)
    last = torch.arange(context - queries, context, device=device)
    return BatchMeta(
        positions=last.repeat(num_seqs).int(),
        token_page=blocks[:, last // block_tokens].flatten().contiguous(),
        token_slot=(last % block_tokens).repeat(num_seqs).int(),
        query_start=torch.arange(0, num_seqs * queries + 1, queries, device=device).int(),
        context_len=torch.full((num_seqs,), context, device=device).int(),
        block_table=blocks.contiguous(),
    )
