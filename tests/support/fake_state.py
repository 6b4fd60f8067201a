"""States as a server's `/morph/v1/state` answers them, made up."""

import time
from typing import Any

import fake_engine
import msgspec

from morphserve.quantize.manifest import Variant
from morphserve.runtime.latency import FinishedRequest, Latency, Percentiles, Rates
from morphserve.runtime.messages import Event
from morphserve.runtime.request import Slo
from morphserve.runtime.server.state import State

REQUEST = FinishedRequest(
    id="cmpl-abc-0",
    time=0.0,
    prompt_tokens=120,
    output_tokens={Variant.FULL: 30, Variant.INT4: 10},
    finish_reason="length",
    queued_s=0.01,
    ttft_s=0.05,
    tpot_s=0.02,
    e2e_s=0.9,
)
EVENTS = [
    Event(1, 0.0, "decision", "50 blocks wanted of 40: to 2 INT4 layers"),
    Event(2, 1.0, "demote", "layer 1 is int4, 60 blocks"),
    Event(3, 2.0, "preempt", "1 preempted, to be computed again"),
]


def make_state(**changes: Any) -> State:
    hello = fake_engine.HELLO
    values: dict[str, Any] = msgspec.structs.asdict(fake_engine.make_snapshot())
    values |= {
        "version": "0.1.0",
        "model": "demo",
        "url": "http://127.0.0.1:8000",
        "status": "ready",
        "started": time.time() - 61,
        "uptime_s": 61.0,
        "slo": Slo(ttft_s=0.1, tpot_s=0.05),
        "ladder": hello.ladder,
        "capacities": hello.capacities,
        "device": hello.device,
        "kernels": hello.kernels,
        "dtype": hello.dtype,
        "memory": hello.memory,
        "latency": Latency(Percentiles(0.02, 0.5, 1.25), None, None),
        "tokens_per_s": Rates(120.0, 340.0),
        "prefix_hit_rate": 0.25,
        "refused": {"queue_full": 3},
        "engine_restarts": 0,
        "requests": [REQUEST],
        "events": EVENTS,
    }
    return State(**values | changes)


def encoded(**changes: Any) -> bytes:
    return msgspec.json.encode(make_state(**changes))
