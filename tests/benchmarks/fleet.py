"""How fast the simulator is: a million requests to a fleet, on one core.

    python tests/benchmarks/fleet.py TRACE [--requests N] [--replicas N] [--router NAME]

TRACE is replayed end to end until there are enough requests, at a rate that the replicas bear.
"""

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, SchedulerConfig
from morphserve.morphcli.bench.summary import percentile
from morphserve.morphcli.simulate.devices import find_device
from morphserve.morphcli.simulate.fleet import Fleet, simulate
from morphserve.morphcli.simulate.gpu import gpu_target
from morphserve.morphcli.simulate.router import ROUTERS
from morphserve.morphcli.simulate.sizes import find_model
from morphserve.morphcli.traces.arrivals import Arrival, Trace
from morphserve.morphcli.traces.readers import read_trace
from morphserve.morphcli.traces.schedule import Schedule


def endless(trace: Trace, faster: float) -> Iterator[Arrival]:
    """The trace again and again, so many times as fast."""
    span_s = trace.arrivals[-1].time_s + 1.0
    for again in itertools.count():
        for a in trace.arrivals:
            yield Arrival((again * span_s + a.time_s) / faster, a.prompt_tokens, a.output_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.25, help="of the trace's, per replica")
    parser.add_argument("--router", choices=ROUTERS, default="least-loaded")
    parser.add_argument("--policy", default="balanced")
    given = parser.parse_args()
    faster = given.rate * given.replicas
    rows = tuple(itertools.islice(endless(read_trace(given.trace), faster), given.requests))
    fleet = Fleet(
        gpu_target(find_device("h100"), find_model("llama-3-8b"), "llama-3-8b"),
        replicas=given.replicas,
        router=given.router,
        cache=CacheConfig(memory_budget=40 * 2**30),
        limits=SchedulerConfig(256, 2048, 8192),
    )
    started, began = time.perf_counter(), time.process_time()
    run = simulate(fleet, Schedule(rows, rows[-1].time_s), load_policy(given.policy))
    took, cpu = time.perf_counter() - started, time.process_time() - began
    answered = [o for o in run.outcomes if o.e2e_s is not None]
    print(
        f"{len(rows):,} requests ({len(answered):,} answered) over {rows[-1].time_s / 3600:.1f} h "
        f"on {given.replicas} replicas, {given.router}, {given.policy}: {took:.1f} s "
        f"({cpu:.1f} s of one core), {1e6 * cpu / len(rows):.0f} us a request"
    )
    print(
        f"first token P95 {percentile([o.ttft_s or 0 for o in answered], 95):.3f} s, "
        f"{run.states[-1].swaps} swaps, at most {max(s.running for s in run.states)} at once; "
        f"load average {os.getloadavg()[0]:.2f}"
    )


if __name__ == "__main__":
    main()
