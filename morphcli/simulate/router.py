"""Which replica a request goes to."""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from morphserve.configs.errors import ConfigError


class ReplicaLoad(msgspec.Struct, frozen=True, gc=False):
    """What a router knows of one replica."""

    running: int  # requests
    waiting: int  # requests
    used_blocks: int  # of KV
    full_blocks: int  # of KV, that it has with all layers at full precision
    rung: int = 0  # steps of its ladder that are taken
    queued_tokens: int = 0  # of prompts that are still to be computed


class Router(Protocol):
    """Asked once per request, in order of arrival."""

    def choose(self, replicas: Sequence[ReplicaLoad], request_tokens: int) -> int:
        """The replica that a request of so many tokens, prompt and output, goes to."""


class RoundRobin:
    """Each in its turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, replicas: Sequence[ReplicaLoad], request_tokens: int) -> int:
        chosen = self._next % len(replicas)
        self._next = chosen + 1
        return chosen


class LeastLoaded:
    """The fewest requests in flight; among equals, the fewest tokens of prompts in the queue."""

    def choose(self, replicas: Sequence[ReplicaLoad], request_tokens: int) -> int:
        best, least, queued = 0, -1, 0
        for i, replica in enumerate(replicas):
            load = replica.running + replica.waiting
            if load < least or least < 0 or (load == least and replica.queued_tokens < queued):
                best, least, queued = i, load, replica.queued_tokens
        return best


class PressureAware:
    """Spreads before it morphs: the least demand over what full precision holds.

    Demand is judged against the capacity at full precision, since a replica that has morphed must
    not look idle for having grown. What waits counts in full, as it will want its blocks, and once
    more as work ahead of the request. A layer that is demoted counts like some more demand: of two
    replicas that are equally full, the request goes to the one that serves it at full precision.
    """

    def __init__(
        self, block_tokens: int = 16, queue_weight: float = 1.0, rung_weight: float = 0.02
    ) -> None:
        self._block_tokens = block_tokens
        self._queue_weight = queue_weight  # of the queue's share of the capacity
        self._rung_weight = rung_weight  # per rung, in shares of the capacity

    def choose(self, replicas: Sequence[ReplicaLoad], request_tokens: int) -> int:
        queue_weight = (1 + self._queue_weight) / self._block_tokens
        own, rung_weight = request_tokens / self._block_tokens, self._rung_weight
        best, least = 0, float("inf")
        for i, replica in enumerate(replicas):
            demand = replica.used_blocks + queue_weight * replica.queued_tokens + own
            score = demand / replica.full_blocks + rung_weight * replica.rung
            if score < least:
                best, least = i, score
        return best


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "pressure-aware": PressureAware,
}


def make_router(name: str) -> Router:
    """A router by its policy's name."""
    if name not in ROUTERS:
        raise ConfigError(f"--router {name!r} is not known: use {', '.join(ROUTERS)}")
    return ROUTERS[name]()
