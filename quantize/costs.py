"""What a layer costs in time on one device, as `morph profile` measured it there."""

import msgspec


class AttentionTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's attention over a batch of equal sequences."""

    num_seqs: int
    query_tokens: int  # per sequence; 1 in decode
    context_tokens: int  # per sequence, the query's own included
    seconds: float


class LayerTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer without its attention, at each number of tokens in `DeviceCosts.tokens`."""

    variant: str  # full, int8 or int4
    seconds: list[float]


class DeviceCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured on one device; what another device would take has to be measured there."""

    device: str  # model of the CPU or GPU
    kernels: str
    threads: int
    dtype: str  # of full-precision weights
    tokens: list[int]  # in the batch
    layers: list[LayerTimes]
    head_seconds: list[float]  # final norm and logits of each number of rows in `tokens`
    attention: list[AttentionTime]
