"""The kernels for NVIDIA GPUs: the operations of the protocol, and the steps of a forward pass.

Nothing here waits for the device except `sample`. A decoder layer works in place on two tensors:
`residual`, and `delta`, which is not yet added to it, so that one launch adds and norms.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import (
    GREEDY,
    AttentionShape,
    BatchMeta,
    Draw,
    FullLinear,
    LayerWeights,
    Linear,
    QKNorm,
    QuantizedLinear,
)
from morphserve.runtime.kernels.cuda import embed, packing, pointwise, rope, sampling
from morphserve.runtime.kernels.cuda.attention import attention
from morphserve.runtime.kernels.cuda.draws import pack_draws
from morphserve.runtime.kernels.cuda.linear import linear
from morphserve.runtime.kernels.cuda.sampling import DeviceDraws
from morphserve.runtime.kernels.cuda.splits import SplitPlan, plan_splits


class CudaKernels:
    """Triton's kernels, and cuBLAS for full-precision weights. Activations are as the weights."""

    name = "triton"  # renamed when times change: measured costs are found by it
    max_head_dim = 256

    def weight_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        # float16 has digits that bfloat16 has not: what was asked for is full precision.
        return torch.bfloat16 if checkpoint_dtype == torch.bfloat16 else torch.float32

    def activation_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return weight_dtype

    def pack_full(self, weight: Tensor) -> FullLinear:
        return packing.pack_full(weight)

    def pack_quantized(self, weight: QuantizedWeight) -> QuantizedLinear:
        return packing.pack_quantized(weight)

    def embed(self, tokens: Tensor, table: FullLinear) -> Tensor:
        return embed.embed(tokens, table)

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        return linear(x, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return pointwise.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return pointwise.add_rms_norm(x, residual, weight, eps)

    def rope_write_kv(
        self,
        qkv: Tensor,
        cache: Tensor,
        meta: BatchMeta,
        shape: AttentionShape,
        cos_sin: Tensor,
        norm: QKNorm | None,
    ) -> Tensor:
        return rope.rope_write_kv(qkv, cache, meta, shape, cos_sin, norm)

    def attention(self, q: Tensor, cache: Tensor, meta: BatchMeta, shape: AttentionShape) -> Tensor:
        return attention(q, cache, meta, self.plan(meta, shape), shape)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return pointwise.silu_mul(gate_up)

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
        delta = residual.clone()
        residual.zero_()
        self._run(delta, residual, layers, caches, meta, shape, cos_sin)
        return residual[rows] + delta[rows]

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
        delta, residual = self.enter(tokens, embedding)
        self._run(delta, residual, layers, caches, meta, shape, cos_sin)
        return self.leave(delta, residual, rows, norm, shape.norm_eps, head)

    def sample(self, logits: Tensor, draws: Mapping[int, Draw]) -> list[int | None]:
        of_rows = [draws.get(i, GREEDY) for i in range(len(logits))]
        packed = pack_draws(of_rows, logits.shape[1], logits.device)
        chosen = self.choose(logits, packed).tolist()
        return [None if token < 0 else token for token in chosen]

    def plan(self, meta: BatchMeta, shape: AttentionShape) -> SplitPlan:
        """How the attention of this step is split up, the same for all layers."""
        return plan_splits(meta, shape)

    def enter(self, tokens: Tensor, embedding: FullLinear) -> tuple[Tensor, Tensor]:
        """What the first layer takes for token ids [M]: (delta, residual), each [M, hidden]."""
        return embed.embed_beside_zeros(tokens, embedding)

    def layer(
        self,
        delta: Tensor,
        residual: Tensor,
        layer: LayerWeights,
        cache: Tensor,
        meta: BatchMeta,
        plan: SplitPlan,
        shape: AttentionShape,
        cos_sin: Tensor,
    ) -> None:
        """One decoder layer, in place: adds `delta` into `residual` and leaves its own there."""
        x = self.add_rms_norm(delta, residual, layer.input_norm, shape.norm_eps)
        qkv = linear(x, layer.qkv)
        q = self.rope_write_kv(qkv, cache, meta, shape, cos_sin, layer.qk_norm)
        x = linear(attention(q, cache, meta, plan, shape), layer.o)
        x = self.add_rms_norm(x, residual, layer.post_norm, shape.norm_eps)
        linear(self.silu_mul(linear(x, layer.gate_up)), layer.down, out=delta)

    def leave(
        self,
        delta: Tensor,
        residual: Tensor,
        rows: Tensor,
        norm: Tensor,
        eps: float,
        head: FullLinear,
    ) -> Tensor:
        """Logits [len(rows), vocab] of these rows of what the last layer left."""
        return linear(pointwise.add_rms_norm_rows(delta, residual, rows, norm, eps), head)

    def choose(self, logits: Tensor, draws: DeviceDraws | None) -> Tensor:
        """Each row's token, int32 [S] on the device: -1 where the row is not finite.

        draws: how each is drawn; None: all are the likeliest.
        """
        return sampling.choose(logits, draws)

    def _run(
        self,
        delta: Tensor,
        residual: Tensor,
        layers: Sequence[LayerWeights],
        caches: Sequence[Tensor],
        meta: BatchMeta,
        shape: AttentionShape,
        cos_sin: Tensor,
    ) -> None:
        plan = self.plan(meta, shape)
        for layer, cache in zip(layers, caches, strict=True):
            self.layer(delta, residual, layer, cache, meta, plan, shape, cos_sin)
