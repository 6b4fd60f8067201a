"""A comparison on a simulated device: from a trace to the same run folder, no server started."""

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from morphserve.configs.errors import ConfigError
from morphserve.configs.load import load_policy, parse_bytes
from morphserve.configs.schema import CacheConfig, SchedulerConfig
from morphserve.morphcli.bench.compare import served_policy
from morphserve.morphcli.bench.record import (
    Simulated,
    Summary,
    append_run,
    open_record,
    trace_facts,
)
from morphserve.morphcli.bench.run import BenchRequest, conclude
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.bench.table import policy_title
from morphserve.morphcli.simulate.devices import find_device
from morphserve.morphcli.simulate.fleet import Fleet, simulate
from morphserve.morphcli.simulate.gpu import gpu_target
from morphserve.morphcli.simulate.here import HERE, this_machine
from morphserve.morphcli.simulate.sizes import find_model
from morphserve.morphcli.simulate.target import Target
from morphserve.morphcli.traces.readers import read_trace
from morphserve.morphcli.traces.schedule import Schedule, find_burst, shape_trace


@dataclass(frozen=True, slots=True)
class Setup:
    """What `morph bench` was told of the machines to simulate."""

    device: str
    replicas: int = 1
    router: str = "least-loaded"
    slowdown: float = 1.0  # of steps, by what else runs on the machine

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"--replicas must be at least 1, not {self.replicas}")
        if not self.slowdown > 0:
            raise ConfigError(f"--slowdown must be above 0, not {self.slowdown:g}")


def simulate_bench(request: BenchRequest, setup: Setup, console: Console) -> Summary:
    """Replay the trace under each policy on a clock of costs, and write the run folder."""
    trace = read_trace(request.trace, request.reading)
    if skipped := trace.describe_bad_rows():
        console.print(f"[yellow]warning:[/] {escape(skipped)}", highlight=False)
    schedule = shape_trace(trace, request.shape)
    burst = find_burst(schedule.arrivals, schedule.duration_s)
    facts = trace_facts(schedule, 0, skipped, burst)
    fleet = fleet_of(request, setup)
    open_record(request.output, force=request.force)
    runs = []
    for policy in request.policies:
        console.print(f"simulating {policy_title(policy)}", highlight=False)
        runs.append(_run(fleet, schedule, policy))
        append_run(request.output, runs[-1])
    target = fleet.target
    simulated = Simulated(
        target.device, setup.replicas, setup.router, setup.slowdown, dict(target.about or {})
    )
    return conclude(request, facts, runs, schedule, simulated=simulated)


def fleet_of(request: BenchRequest, setup: Setup) -> Fleet:
    """Raises MorphError for a device or a model that cannot be simulated."""
    budget = None if request.memory_budget is None else parse_bytes(request.memory_budget)
    cache = CacheConfig(memory_budget=budget)
    return Fleet(
        _target(request, setup.device, cache),
        replicas=setup.replicas,
        router=setup.router,
        cache=cache,
        limits=SchedulerConfig(max_model_len=request.max_model_len),
        timeout_s=request.timeout_s,
        slowdown=setup.slowdown,
    )


def _target(request: BenchRequest, device: str, cache: CacheConfig) -> Target:
    if device != HERE:
        return gpu_target(find_device(device), find_model(request.model), request.model)
    if request.bundle is None:
        raise ConfigError(
            "--simulate here goes by times that were measured on this machine: give --bundle, made "
            f"by `morph quantize {request.model}` and timed by `morph profile`"
        )
    return this_machine(request.model, request.bundle, cache)


def _run(fleet: Fleet, schedule: Schedule, policy: str) -> Run:
    return simulate(fleet, schedule, load_policy(served_policy(policy)), policy)
