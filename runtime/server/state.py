"""What `/morph/v1/state` answers: the server at one moment, never anybody's text."""

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from morphserve.configs.version import version
from morphserve.quantize.manifest import Rung
from morphserve.runtime.latency import FinishedRequest, Latency, Rates, recent_rates
from morphserve.runtime.messages import Event, MemoryBytes, Snapshot
from morphserve.runtime.request import Slo

if TYPE_CHECKING:
    from morphserve.runtime.server.serving import Serving

_SHOWN_EVENTS = 50


class State(Snapshot, tag=False, kw_only=True, frozen=True):
    """A snapshot of the engine, what of it never changes, and what the HTTP process knows."""

    version: str
    model: str
    url: str
    status: str  # ready, draining, engine down
    started: float  # seconds since the epoch
    uptime_s: float
    slo: Slo  # that the server promises
    ladder: Sequence[Rung]  # steps of demotion, the first taken first
    capacities: Sequence[int]  # KV blocks at rung 0, 1, ... the deepest that the policy allows
    device: str
    kernels: str
    dtype: str  # of full-precision weights and KV
    memory: MemoryBytes
    latency: Latency
    tokens_per_s: Rates  # over the last two seconds
    prefix_hit_rate: float | None  # share of prompt tokens, since the start; None: none looked up
    refused: Mapping[str, int]  # requests not taken, by reason
    engine_restarts: int  # engines started in a dead one's place
    requests: Sequence[FinishedRequest]  # the latest, oldest first
    events: Sequence[Event]  # the latest, oldest first


def state_of(serving: "Serving") -> State:
    engine, hello, snapshot = serving.engine, serving.engine.hello, serving.engine.snapshot
    recent = islice(reversed(engine.events), _SHOWN_EVENTS)
    hits, queries = snapshot.prefix_hits, snapshot.prefix_queries
    return State(
        **msgspec.structs.asdict(snapshot),
        version=version(),
        model=serving.model_name,
        url=serving.url,
        status=_status(serving),
        started=float(serving.created),
        uptime_s=max(0.0, time.time() - serving.created),
        slo=serving.slo,
        ladder=hello.ladder,
        capacities=hello.capacities,
        device=hello.device,
        kernels=hello.kernels,
        dtype=hello.dtype,
        memory=hello.memory,
        latency=serving.metrics.latency(),
        tokens_per_s=recent_rates(engine.snapshots),
        prefix_hit_rate=hits / queries if queries else None,
        refused=dict(serving.refused),
        engine_restarts=serving.engine_restarts,
        requests=list(serving.metrics.recent),
        events=list(recent)[::-1],
    )


def _status(serving: "Serving") -> str:
    if serving.engine.died.is_set():
        return "engine down"
    return "draining" if serving.draining else "ready"
