"""What `/morph/v1/state` answers: the whole server at one moment."""

from collections.abc import Sequence
from itertools import islice

import msgspec

from morphserve.quantize.manifest import Rung
from morphserve.runtime.engine_client import EngineClient
from morphserve.runtime.messages import Event, MemoryBytes, Snapshot
from morphserve.runtime.metrics import Latency

_SHOWN_EVENTS = 50


class State(Snapshot, tag=False, kw_only=True, frozen=True):
    """A snapshot of the engine, what of it never changes, and what the HTTP process knows."""

    model: str
    ladder: Sequence[Rung]  # steps of demotion, the first taken first
    capacities: Sequence[int]  # KV blocks at rung 0, 1, ... the deepest that the policy allows
    device: str
    kernels: str
    dtype: str  # of full-precision weights and KV
    memory: MemoryBytes
    latency: Latency
    engine_restarts: int  # engines started in a dead one's place
    refused: dict[str, int]  # requests by reason: queue_full, queued_tokens, queue_timeout, ...
    events: Sequence[Event]  # the latest, oldest first


def state_of(engine: EngineClient, model: str, latency: Latency, refused: dict[str, int]) -> State:
    hello, recent = engine.hello, islice(reversed(engine.events), _SHOWN_EVENTS)
    return State(
        **msgspec.structs.asdict(engine.snapshot),
        model=model,
        ladder=hello.ladder,
        capacities=hello.capacities,
        device=hello.device,
        kernels=hello.kernels,
        dtype=hello.dtype,
        memory=hello.memory,
        latency=latency,
        engine_restarts=engine.restarts,
        refused=refused,
        events=list(recent)[::-1],
    )
