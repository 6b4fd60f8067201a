"""Every operation in plain torch, written as the formula.

What fast kernels are checked against, and most of what serves without a compiler.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import (
    AttentionShape,
    BatchMeta,
    Draw,
    FullLinear,
    LayerWeights,
    Linear,
    QKNorm,
    QuantizedLinear,
)
from morphserve.runtime.kernels.drawing import draw_token


class ReferenceKernels:
    """Works on any device and dtype; float32 inside, rounded once to the activation dtype."""

    name = "reference"
    max_head_dim = 2**20

    def weight_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if checkpoint_dtype == torch.bfloat16 else torch.float32

    def activation_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return weight_dtype

    def pack_full(self, weight: Tensor) -> FullLinear:
        return FullLinear(weight.contiguous(), None, len(weight))

    def pack_quantized(self, weight: QuantizedWeight) -> QuantizedLinear:
        """Two INT4 codes to a byte, the even feature in the low half: [N, K / 2]. Else as given."""
        codes, order = weight.codes, weight.input_order
        if weight.bits == 4:
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        order = None if order is None else order.int()
        scales, zeros, outputs = weight.scales, weight.zeros, len(codes)
        return QuantizedLinear(weight.bits, codes, scales, zeros, order, None, outputs)

    def embed(self, tokens: Tensor, table: FullLinear) -> Tensor:
        rows = F.embedding(tokens, table.weight)
        return rows.to(self.activation_dtype(table.weight.dtype))

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        if isinstance(weight, FullLinear):
            return F.linear(x, weight.weight.to(x.dtype), _as(x.dtype, weight.bias))
        x = in_column_order(x, weight)
        return F.linear(x, dequantise(weight).to(x.dtype), _as(x.dtype, weight.bias))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _unit_rms(x.float(), weight, eps).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual.add_(x)
        return self.rms_norm(residual, weight, eps)

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
            q = _unit_rms(q, norm.q, shape.norm_eps)
            k = _unit_rms(k, norm.k, shape.norm_eps)
        turn = cos_sin[meta.positions.long()].unsqueeze(1)  # [M, 1, D]
        page, slot = meta.token_page.long(), meta.token_slot.long()
        k_pages, v_pages = split_pages(cache, shape)
        k_pages[page, :, :, slot] = _rotate(k, turn).to(cache.dtype)
        v_pages[page, :, slot, :] = v.to(cache.dtype)
        return _rotate(q, turn).to(qkv.dtype)

    def attention(self, q: Tensor, cache: Tensor, meta: BatchMeta, shape: AttentionShape) -> Tensor:
        starts, lengths = meta.query_start.tolist(), meta.context_len.tolist()
        outputs = []
        for i, length in enumerate(lengths):
            pages = meta.block_table[i, : -(-length // shape.block_tokens)]
            k, v = _gather(cache, pages, length, shape)
            outputs.append(_attend(q[starts[i] : starts[i + 1]], k, v))
        return torch.cat(outputs)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def run_layers(
        self,
        residual: Tensor,
        layers: Sequence[LayerWeights],
        caches: Sequence[Tensor],
        meta: BatchMeta,
        shape: AttentionShape,
        cos_sin: Tensor,
        rows: Tensor,
    ) -> Tensor:
        for layer, cache in zip(layers, caches, strict=True):
            x = self.rms_norm(residual, layer.input_norm, shape.norm_eps)
            qkv = self.linear(x, layer.qkv)
            q = self.rope_write_kv(qkv, cache, meta, shape, cos_sin, layer.qk_norm)
            x = self.linear(self.attention(q, cache, meta, shape), layer.o)
            x = self.add_rms_norm(x, residual, layer.post_norm, shape.norm_eps)
            residual += self.linear(self.silu_mul(self.linear(x, layer.gate_up)), layer.down)
        return residual[rows]

    def forward(
        self,
        tokens: Tensor,
        embedding: FullLinear,
        layers: Sequence[LayerWeights],
        caches: Sequence[Tensor],
        meta: BatchMeta,
        shape: AttentionShape,
        cos_sin: Tensor,
        rows: Tensor,
        norm: Tensor,
        head: FullLinear,
    ) -> Tensor:
        residual = self.embed(tokens, embedding)
        x = self.run_layers(residual, layers, caches, meta, shape, cos_sin, rows)
        return self.linear(self.rms_norm(x, norm, shape.norm_eps), head)

    def sample(self, logits: Tensor, draws: Mapping[int, Draw]) -> list[int | None]:
        sound = logits.isfinite().all(dim=-1).tolist()
        likeliest = logits.argmax(dim=-1).tolist()
        return [
            None if not sound[i] else draw_token(row, draws[i]) if i in draws else likeliest[i]
            for i, row in enumerate(logits)
        ]


def dequantise(weight: QuantizedLinear) -> Tensor:
    """The float32 weight [N, K] of `ReferenceKernels.pack_quantized`'s layout, by column."""
    codes, scales = weight.codes, weight.scales.float().unsqueeze(-1)
    if weight.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    groups = codes.view(*weight.scales.shape, -1).float()
    zeros = float(1 << weight.bits - 1) if weight.zeros is None else weight.zeros.unsqueeze(-1)
    return ((groups - zeros) * scales).flatten(1)


def in_column_order(x: Tensor, weight: QuantizedLinear) -> Tensor:
    """Inputs [M, K] in the order of the weight's columns."""
    return x if weight.input_order is None else x.index_select(1, weight.input_order)


def split_pages(cache: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Views of the K [pages, G, D, B] and V [pages, G, B, D] of the reference's pages."""
    heads, dim, tokens = shape.num_kv_heads, shape.head_dim, shape.block_tokens
    k, v = cache.view(-1, 2, heads * dim * tokens).unbind(1)
    return k.view(-1, heads, dim, tokens), v.view(-1, heads, tokens, dim)


def _as(dtype: torch.dtype, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _unit_rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x [M, heads, D] by angles given as D/2 cosines, then D/2 sines, [M, 1, D]."""
    cos, sin = turn.chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _gather(
    cache: Tensor, pages: Tensor, length: int, shape: AttentionShape
) -> tuple[Tensor, Tensor]:
    """One sequence's K [G, D, length] and V [G, length, D] as float32."""
    k_pages, v_pages = split_pages(cache, shape)
    k = k_pages[pages.long()].permute(1, 2, 0, 3).flatten(2)
    v = v_pages[pages.long()].transpose(0, 1).flatten(1, 2)
    return k[:, :, :length].float(), v[:, :length].float()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [n, H, D], the last n of the sequence's tokens: [n, H * D]."""
    num_queries, num_heads, dim = q.shape
    length = k.shape[-1]
    grouped = q.float().view(num_queries, len(k), num_heads // len(k), dim)
    scores = torch.einsum("ngrd,gdt->ngrt", grouped, k) * dim**-0.5
    position = torch.arange(length - num_queries, length, device=q.device)
    future = torch.arange(length, device=q.device) > position[:, None]
    weights = scores.masked_fill(future[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("ngrt,gtd->ngrd", weights, v).reshape(num_queries, -1).to(q.dtype)
