"""The operations a device must offer, with shapes and dtypes.

M: tokens in the batch, N and K: output and input features, H and G: query and KV heads,
D: head dimension, B: tokens per block, S: sequences in the batch.

A KV page holds one block of one layer in 2 * G * D * B items, in a layout of the kernels' own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.weights import QuantizedWeight


@dataclass(frozen=True, slots=True)
class FullLinear:
    """Weight in the layout that `Kernels.pack_full` made."""

    weight: Tensor
    bias: Tensor | None  # [N]
    num_outputs: int  # N; the layout may have more


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """Codes, scales and zeros in the layout that `Kernels.pack_quantized` made."""

    bits: int  # 4 or 8
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None  # None: symmetric
    input_order: Tensor | None  # int32 [K], the input of each column of codes; None: in order
    bias: Tensor | None  # [N]
    num_outputs: int  # N; the layout may have more


Linear = FullLinear | QuantizedLinear


@dataclass(frozen=True, slots=True)
class AttentionShape:
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # D
    block_tokens: int  # B
    norm_eps: float  # of the q and k norms


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Per-head RMSNorm weights applied before the rotation (Qwen3)."""

    q: Tensor  # [D]
    k: Tensor  # [D]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LayerWeights:
    """One decoder layer, q, k, v fused and gate, up fused."""

    input_norm: Tensor  # [hidden]
    post_norm: Tensor  # [hidden]
    qk_norm: QKNorm | None
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class BatchMeta:
    """Where one step's tokens lie. All int32, contiguous; tokens of a sequence are adjacent."""

    positions: Tensor  # [M]
    token_page: Tensor  # [M] page0 of the block each token is written to
    token_slot: Tensor  # [M] its place in that block, 0..B-1
    query_start: Tensor  # [S + 1] first token of each sequence in the batch
    context_len: Tensor  # [S] tokens in the cache after this step
    block_table: Tensor  # [S, max_blocks] page0 of each block; the rest of a row is padding


class Draw(NamedTuple):
    """How one row's token is drawn, in this order: temperature, min_p, top_k, top_p."""

    temperature: float  # over 0; 0 is the likeliest token
    min_p: float  # least likelihood, as a share of the likeliest token's
    top_k: int  # 0: all
    top_p: float
    uniform: float  # in [0, 1): where in the mass of what is kept, by token id, the token lies


GREEDY = Draw(temperature=0.0, min_p=0.0, top_k=0, top_p=1.0, uniform=0.0)  # the likeliest token


class Kernels(Protocol):
    """One device's operations. Results are new tensors unless a docstring says otherwise."""

    name: str
    max_head_dim: int

    def weight_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """Dtype to keep weights of a checkpoint in this dtype in: float32 or bfloat16."""
        ...

    def activation_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """Dtype of activations when weights have this dtype."""
        ...

    def pack_full(self, weight: Tensor) -> FullLinear:
        """A [N, K] weight in this device's layout (same dtype), without bias."""
        ...

    def pack_quantized(self, weight: QuantizedWeight) -> QuantizedLinear:
        """The weight in this device's layout, without bias.

        Raises ConfigError for groups that this device's kernels do not read.
        """
        ...

    def embed(self, tokens: Tensor, table: FullLinear) -> Tensor:
        """Rows of the [vocab, hidden] table for token ids [M]: [M, hidden], as activations."""
        ...

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        """[M, K] times the weight, transposed: [M, N]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[M, hidden] scaled to unit root mean square, times `weight` [hidden]."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds `x` into `residual` in place and returns the norm of the sum, [M, hidden]."""
        ...

    def rope_write_kv(
        self,
        qkv: Tensor,
        cache: Tensor,
        meta: BatchMeta,
        shape: AttentionShape,
        cos_sin: Tensor,
        norm: QKNorm | None,
    ) -> Tensor:
        """Rotates q and k, writes k and v into the pages, returns q [M, H, D].

        qkv: [M, (H + 2 G) * D]; cache: [pages, 2 * G * D * B] of this layer, written in place;
        cos_sin: [max_position, D] float32, D/2 cosines then D/2 sines. Channels i and i + D/2
        form a pair (the Hugging Face convention).
        """
        ...

    def attention(self, q: Tensor, cache: Tensor, meta: BatchMeta, shape: AttentionShape) -> Tensor:
        """Causal attention of each token over its sequence's pages: [M, H * D].

        The last query of sequence s stands at position `context_len[s] - 1`.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for [M, 2 I] with gate in the first half: [M, I]."""
        ...

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
        """What a step's decoder layers make of `residual` [M, hidden], which is overwritten.

        caches: of each layer, as in `rope_write_kv`, written in place; rows: int64, ascending, the
        tokens of the batch whose result is asked for. Returns [len(rows), hidden], maybe a view of
        `residual`.
        """
        ...

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
        """`embed`, `run_layers`, `rms_norm` and `linear` in one: [len(rows), vocab]."""
        ...

    def sample(self, logits: Tensor, draws: Mapping[int, Draw]) -> list[int | None]:
        """The token of each row of float32 `logits` [S, vocab]; None if the row is not finite.

        Drawn for the rows in `draws`, else the likeliest; of equal logits the lower id comes first.
        """
        ...


def load_kernels(device: str) -> Kernels:
    """The kernels for `cpu` or `cuda`, or `reference` for the plain torch ones.

    Imports only that module. Raises ConfigError for any other name, and where what the kernels
    are written in is not installed.
    """
    if device == "reference":
        from morphserve.runtime.kernels.reference import ReferenceKernels

        return ReferenceKernels()
    if device == "cpu":
        from morphserve.runtime.kernels.cpu import cpu_kernels

        return cpu_kernels()
    if device == "cuda":
        return _cuda_kernels()
    raise ConfigError(f"there are no kernels {device!r}: use cpu, cuda or reference")


def _cuda_kernels() -> Kernels:
    if find_spec("triton") is None:
        raise ConfigError(
            "the kernels for cuda need Triton, which is not installed: install torch for CUDA "
            "(it brings Triton), or serve with the cpu kernels"
        )
    from morphserve.runtime.kernels.cuda.kernels import CudaKernels

    return CudaKernels()
