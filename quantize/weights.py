"""A decoder layer's tensors, full precision or quantised, fused for the forward pass."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Weight = TypeVar("Weight")  # Tensor at full precision, QuantizedWeight otherwise


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
class QuantizedWeight:
    """The weight is `(codes - zeros) * scales`; groups of inputs share a scale and a zero."""

    codes: Tensor  # uint8 [N, K], below 2**bits
    scales: Tensor  # float16 [N, K / group_size]
    group_size: int
    bits: int = 4  # or 8
    zeros: Tensor | None = None  # uint8 [N, K / group_size]; None: symmetric, all `middle`
    # int64 [K], the input that each column of codes belongs to; None: in order. Only layers
    # imported from GPTQ with desc_act have one: there the members of a group are not neighbours.
    input_order: Tensor | None = None

    @property
    def middle(self) -> int:
        """The code of weight 0 in a symmetric weight."""
        return int(1 << (self.bits - 1))


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
