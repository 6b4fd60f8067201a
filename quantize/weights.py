"""One decoder layer's tensors, full precision or INT4, fused as the forward pass wants them."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Weight = TypeVar("Weight")  # Tensor at full precision, Int4Weight at INT4


@dataclass(frozen=True, slots=True)
class Norms:
    """RMSNorm weights of one decoder layer."""

    input: Tensor  # [hidden]
    post_attention: Tensor  # [hidden]
    q: Tensor | None = None  # [head_dim], Qwen3
    k: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Biases:
    """Biases of one decoder layer; None where the architecture has none."""

    qkv: Tensor | None = None
    o: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """Symmetric INT4: the weight is `(codes - 8) * scales`, scales shared by groups of inputs."""

    codes: Tensor  # uint8 [N, K], 0..15
    scales: Tensor  # float16 [N, K / group_size]
    group_size: int


@dataclass(frozen=True, slots=True)
class LayerTensors(Generic[Weight]):
    """The four linears of a layer: q, k, v fused and gate, up fused, rows in that order."""

    norms: Norms
    biases: Biases
    qkv: Weight  # [(H + 2 G) * D, hidden]
    o: Weight  # [hidden, H * D]
    gate_up: Weight  # [2 * intermediate, hidden]
    down: Weight  # [hidden, intermediate]


@dataclass(frozen=True, slots=True)
class StaticTensors:
    """What is never swapped."""

    embedding: Tensor  # [vocab, hidden]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]; the embedding itself where the two are tied
