"""What a step costs in time on one device, as `morph profile` measured it there."""

import msgspec


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Lower quartile of the measured seconds at each number of tokens; these rise strictly."""

    tokens: list[int]
    seconds: list[float]


class LayerTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer in which each token sees itself alone, over the tokens in the batch."""

    variant: str  # full, int8 or int4
    num_bytes: int  # of its image in memory
    curve: Curve


class AttentionTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's attention over a batch of equal sequences."""

    num_seqs: int
    query_tokens: int  # per sequence; 1 in decode
    context_tokens: int  # per sequence, the query's own included
    seconds: float


class DeviceCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured on one device; what another device would take has to be measured there."""

    device: str  # model of the CPU or GPU
    kernels: str
    threads: int
    dtype: str  # of full-precision weights
    layer_weights: int  # in one layer's linears; each is multiplied once per token
    layers: list[LayerTimes]
    attention: list[AttentionTime]
    # A step of so many decoding requests, all but its layers: scheduling, packing, embedding,
    # final norm, logits and greedy choice.
    rest: Curve
