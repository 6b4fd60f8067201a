"""The simulator against servers that were measured on this machine.

    python tests/benchmarks/simulator.py RUN TRACE [--bundle DIR]

RUN is the folder of a finished `morph bench`, TRACE the file that it replayed. The same schedule is
simulated under each policy. How many times longer steps take while HTTP and clients share the cores
is one number for all policies, fitted to their latencies.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from morphserve.configs.load import load_policy
from morphserve.morphcli.bench.compare import served_policy
from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.request import BenchRequest
from morphserve.morphcli.bench.summary import summarise
from morphserve.morphcli.simulate.bench import Setup, fleet_of
from morphserve.morphcli.simulate.fleet import Fleet, simulate
from morphserve.morphcli.traces.readers import read_trace
from morphserve.morphcli.traces.schedule import Schedule, shape_trace

FIGURES: dict[str, Callable[[PolicySummary], float | None]] = {
    "first token P50, ms": lambda p: _ms(p.ttft_s.p50),
    "first token P95, ms": lambda p: _ms(p.ttft_s.p95),
    "per token P50, ms": lambda p: _ms(p.tpot_s.p50),
    "per token P95, ms": lambda p: _ms(p.tpot_s.p95),
    "output tokens/s": lambda p: p.output_tokens_per_s,
    "missed, %": lambda p: 100 * p.slo_miss_share,
    "swaps": lambda p: float(p.server.swaps) if p.server else None,
    "preemptions": lambda p: float(p.server.preemptions) if p.server else None,
    "below full, %": lambda p: 100 * (p.server.quantized_token_share or 0) if p.server else None,
    "full again, s": lambda p: p.server.full_again_s if p.server else None,
}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def simulated(summary: Summary, fleet: Fleet, schedule: Schedule, policy: str) -> PolicySummary:
    run = simulate(fleet, schedule, load_policy(served_policy(policy)), policy)
    burst = summary.trace.burst
    return summarise(run, summary.settings.slo, burst.end_s if burst else schedule.duration_s)


def fitted_slowdown(summary: Summary, fleet: Fleet, schedule: Schedule) -> float:
    """The one of a few dozen under which the policies' latencies are the least off, as ratios."""

    def off(slowdown: float) -> float:
        slowed = replace(fleet, slowdown=slowdown)
        return statistics.fmean(
            abs(math.log(ours / real))
            for measured in summary.policies
            for real, ours in _latencies(
                measured, simulated(summary, slowed, schedule, measured.policy)
            )
        )

    return min((1 + i / 40 for i in range(40)), key=off)


def _latencies(measured: PolicySummary, found: PolicySummary) -> Iterator[tuple[float, float]]:
    for name, figure in FIGURES.items():
        real, ours = figure(measured), figure(found)
        if name.endswith("ms") and real and ours:
            yield real, ours


def request_of(summary: Summary, trace: Path, bundle: Path | None) -> BenchRequest:
    settings = summary.settings
    return BenchRequest(
        model=settings.model,
        trace=trace,
        shape=settings.shape,
        policies=settings.policies,
        slo=settings.slo,
        output=Path("unused"),
        bundle=bundle or (Path(settings.bundle) if settings.bundle else None),
        memory_budget=settings.memory_budget,
        max_model_len=settings.max_model_len,
        timeout_s=settings.timeout_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--bundle", type=Path)
    given = parser.parse_args()
    summary = msgspec.json.decode((given.run / "summary.json").read_bytes(), type=Summary)
    request = request_of(summary, given.trace, given.bundle)
    fleet = fleet_of(request, Setup("here"))
    schedule = shape_trace(read_trace(given.trace), request.shape)
    fleet = replace(fleet, slowdown=fitted_slowdown(summary, fleet, schedule))
    console = Console(width=120)
    console.print(f"steps take {fleet.slowdown:.2f} times what the cost model says")
    table = Table("policy", "figure", "measured", "simulated", "off by")
    for measured in summary.policies:
        found = simulated(summary, fleet, schedule, measured.policy)
        for name, figure in FIGURES.items():
            real, ours = figure(measured), figure(found)
            if real is None or ours is None:
                continue
            off = f"{ours / real - 1:+.0%}" if real else ""
            table.add_row(measured.policy, name, f"{real:.4g}", f"{ours:.4g}", off)
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
