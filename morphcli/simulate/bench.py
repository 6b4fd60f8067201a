"""A comparison on a simulated device: from a trace to the same run folder, no server started."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from msgspec import structs
from rich.console import Console
from rich.markup import escape

from morphserve.configs.errors import ConfigError
from morphserve.configs.load import load_policy, parse_bytes
from morphserve.configs.schema import CacheConfig, SchedulerConfig
from morphserve.morphcli.bench.compare import served_policy
from morphserve.morphcli.bench.conclude import conclude, facts_of, settings_of
from morphserve.morphcli.bench.record import (
    Simulated,
    Summary,
    append_run,
    open_record,
    write_config,
)
from morphserve.morphcli.bench.request import BenchRequest, jobs_of, main_rate
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.bench.terminal import request_progress
from morphserve.morphcli.simulate.devices import DEVICES, find_device
from morphserve.morphcli.simulate.fleet import Fleet, check, simulate
from morphserve.morphcli.simulate.gpu import gpu_target
from morphserve.morphcli.simulate.here import HERE, this_machine
from morphserve.morphcli.simulate.router import make_router
from morphserve.morphcli.simulate.sizes import find_model
from morphserve.morphcli.simulate.target import Target
from morphserve.morphcli.traces.readers import read_trace
from morphserve.morphcli.traces.schedule import Schedule, shape_trace

_FLEET_NOTE = (
    "Requests and memory are those of all replicas together; layers are those of the replica that "
    "is furthest below full precision at the time."
)


@dataclass(frozen=True, slots=True)
class Setup:
    """What `morph bench` was told of the machines to simulate."""

    device: str
    replicas: int = 1
    router: str = "least-loaded"
    slowdown: float = 1.0  # of steps, by what else runs on the machine
    tensor_parallel: int = 1  # devices of a replica
    max_num_seqs: int | None = None  # requests running at once; None: as on a CPU
    max_num_batched_tokens: int | None = None  # in one step; None: as on a CPU

    def limits(self, max_model_len: int | None) -> SchedulerConfig:
        """Of a replica's steps."""
        plain = SchedulerConfig(max_model_len=max_model_len)
        seqs = plain.max_num_seqs if self.max_num_seqs is None else self.max_num_seqs
        tokens = self.max_num_batched_tokens
        return SchedulerConfig(
            seqs, plain.max_num_batched_tokens if tokens is None else tokens, max_model_len
        )

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"--replicas must be at least 1, not {self.replicas}")
        if not 0 < self.slowdown < math.inf:
            raise ConfigError(f"--slowdown must be above 0, not {self.slowdown:g}")
        make_router(self.router)


def simulate_bench(request: BenchRequest, setup: Setup, console: Console) -> Summary:
    """Replay the trace under each policy on a clock of costs, and write the run folder."""
    if request.repeat > 1:
        raise ConfigError("--simulate gives the same each time: leave out --repeat")
    trace = read_trace(request.trace, request.reading)
    if skipped := trace.describe_bad_rows():
        console.print(f"[yellow]warning:[/] {escape(skipped)}", highlight=False)
    loads = {rate: shape_trace(trace, request.shape.at(rate)) for rate in request.rates}
    schedule = loads[main_rate(request.rates)]
    fleet = fleet_of(request, setup)
    for policy in request.policies:
        check(fleet, load_policy(served_policy(policy)))
    open_record(request.output, force=request.force)
    write_config(request.output, settings_of(request, _about(fleet)))
    runs: list[Run] = []
    with request_progress(console) as progress:
        for job in jobs_of(request):
            load = loads[job.rate]
            task = progress.add_task(f"{job.title:<16}", total=len(load.arrivals))
            run = _run(fleet, load, job.policy, partial(progress.advance, task))
            runs.append(structs.replace(run, rate=job.rate))
            append_run(request.output, runs[-1])
            progress.stop_task(task)
    if setup.replicas > 1:
        runs[0].notes.append(_FLEET_NOTE)
    return conclude(
        request, facts_of(schedule, 0, skipped), runs, schedule, simulated=_about(fleet)
    )


def _about(fleet: Fleet) -> Simulated:
    target = fleet.target
    return Simulated(
        target.device, fleet.replicas, fleet.router, fleet.slowdown, dict(target.about or {})
    )


def fleet_of(request: BenchRequest, setup: Setup) -> Fleet:
    """Raises MorphError for a device or a model that cannot be simulated."""
    cache = CacheConfig()
    target = _target(request, setup, cache)
    # One budget for every policy: by itself each would take what its own sizes call for.
    budget = target.memory_bytes - target.reserved_bytes
    if request.memory_budget is not None:
        budget = parse_bytes(request.memory_budget)
    return Fleet(
        target,
        replicas=setup.replicas,
        router=setup.router,
        cache=replace(cache, memory_budget=budget),
        limits=setup.limits(request.max_model_len),
        timeout_s=request.timeout_s,
        slowdown=setup.slowdown,
    )


def _target(request: BenchRequest, setup: Setup, cache: CacheConfig) -> Target:
    if setup.device.lower() not in (HERE, *DEVICES):
        names = ", ".join((HERE, *DEVICES))
        raise ConfigError(f"--simulate {setup.device!r} is not known: use {names}")
    if setup.device.lower() != HERE:
        return gpu_target(
            find_device(setup.device),
            find_model(request.model),
            request.model,
            tensor_parallel=setup.tensor_parallel,
        )
    if setup.tensor_parallel > 1:
        raise ConfigError("--tensor-parallel is for GPUs: leave it out with --simulate here")
    if request.memory_budget is None:
        raise ConfigError("give --memory-budget, as 96MiB: no server takes the whole machine")
    if request.bundle is None:
        raise ConfigError(
            "--simulate here goes by times that were measured on this machine: give --bundle, made "
            f"by `morph quantize {request.model}` and timed by `morph profile`"
        )
    return this_machine(request.model, request.bundle, cache)


def _run(fleet: Fleet, schedule: Schedule, policy: str, on_requests: Callable[[int], None]) -> Run:
    return simulate(fleet, schedule, load_policy(served_policy(policy)), policy, on_requests)
