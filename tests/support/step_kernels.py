"""The reference's operations as the step runner wants them: in pieces, and without ever waiting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta, FullLinear, LayerWeights, QKNorm
from morphserve.runtime.kernels.reference import ReferenceKernels, _rotate, _unit_rms, split_pages


@dataclass(frozen=True)
class Plan:
    """What each token of the batch sees."""

    tables: Tensor  # [M, max_blocks] blocks of its sequence; page 0 where it sees none
    context: Tensor  # [M] tokens of the cache, itself included; 0: it is padding


class StepKernels(ReferenceKernels):
    """Honours padding, and reads no number on the host."""

    def plan(self, meta: BatchMeta, shape: AttentionShape) -> Plan:
        place = torch.arange(len(meta.positions), dtype=torch.int32)
        sequence = torch.searchsorted(meta.query_start[1:].contiguous(), place, right=True)
        is_real = meta.context_len.index_select(0, sequence) > 0
        context = torch.where(is_real, meta.positions + 1, 0)
        tables = meta.block_table.index_select(0, sequence)
        first = torch.arange(tables.shape[1]) * shape.block_tokens
        return Plan(torch.where(first < context[:, None], tables, 0).long(), context)

    def enter(self, tokens: Tensor, embedding: FullLinear) -> tuple[Tensor, Tensor]:
        delta = self.embed(tokens, embedding)
        return delta, torch.zeros_like(delta)

    def layer(
        self,
        delta: Tensor,
        residual: Tensor,
        layer: LayerWeights,
        cache: Tensor,
        meta: BatchMeta,
        plan: Plan,
        shape: AttentionShape,
        cos_sin: Tensor,
    ) -> None:
        x = self.add_rms_norm(delta, residual, layer.input_norm, shape.norm_eps)
        qkv = self.linear(x, layer.qkv)
        q = self.rope_write_kv(qkv, cache, meta, shape, cos_sin, layer.qk_norm)
        x = _attend(q, cache, plan, shape)
        x = self.add_rms_norm(self.linear(x, layer.o), residual, layer.post_norm, shape.norm_eps)
        delta.copy_(self.linear(self.silu_mul(self.linear(x, layer.gate_up)), layer.down))

    def leave(
        self,
        delta: Tensor,
        residual: Tensor,
        rows: Tensor,
        norm: Tensor,
        eps: float,
        head: FullLinear,
    ) -> Tensor:
        x = residual.index_select(0, rows) + delta.index_select(0, rows)
        return self.linear(self.rms_norm(x, norm, eps), head)

    def rope_write_kv(
        self,
        qkv: Tensor,
        cache: Tensor,
        meta: BatchMeta,
        shape: AttentionShape,
        cos_sin: Tensor,
        norm: QKNorm | None,
    ) -> Tensor:
        heads = qkv.float().view(len(qkv), -1, shape.head_dim)
        q, k, v = torch.split(heads, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
        if norm is not None:
            q, k = _unit_rms(q, norm.q, shape.norm_eps), _unit_rms(k, norm.k, shape.norm_eps)
        turn = cos_sin[meta.positions.long()].unsqueeze(1)
        # What is padding writes back what page 0 holds, which no sequence has.
        page, slot = meta.token_page.clamp(min=0).long(), meta.token_slot.long()
        is_real = (meta.token_page >= 0)[:, None, None]
        k_pages, v_pages = split_pages(cache, shape)
        k = torch.where(is_real, _rotate(k, turn).to(cache.dtype), k_pages[page, :, :, slot])
        v = torch.where(is_real, v.to(cache.dtype), v_pages[page, :, slot, :])
        k_pages[page, :, :, slot] = k
        v_pages[page, :, slot, :] = v
        return _rotate(q, turn).to(qkv.dtype)


def _attend(q: Tensor, cache: Tensor, plan: Plan, shape: AttentionShape) -> Tensor:
    """Attention of each token by itself: [M, H * D]."""
    (tokens, width), groups = plan.tables.shape, shape.num_kv_heads
    length = width * shape.block_tokens
    k_pages, v_pages = split_pages(cache, shape)
    k = k_pages[plan.tables].permute(0, 2, 1, 4, 3).reshape(tokens, groups, length, -1)
    v = v_pages[plan.tables].permute(0, 2, 1, 3, 4).reshape(tokens, groups, length, -1)
    seen = (torch.arange(length)[None, :] < plan.context[:, None])[:, None, :, None]
    k, v = torch.where(seen, k.float(), 0.0), torch.where(seen, v.float(), 0.0)
    grouped = q.float().view(tokens, groups, -1, shape.head_dim)
    scores = grouped @ k.transpose(2, 3) * shape.head_dim**-0.5
    weights = torch.where(seen.transpose(2, 3), scores, -1e30).softmax(dim=-1)
    return (weights @ v).view(tokens, -1).to(q.dtype)
