"""Replicas behind a router, under a schedule: what `morph bench` would have recorded."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from morphserve.configs.schema import CacheConfig, EngineConfig, Policy, SchedulerConfig, Slo
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.server import State
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.simulate.engine import SimulatedEngine
from morphserve.morphcli.simulate.replica import Replica
from morphserve.morphcli.simulate.router import make_router
from morphserve.morphcli.simulate.target import Target
from morphserve.morphcli.traces.schedule import Schedule
from morphserve.quantize.manifest import Variant
from morphserve.runtime.ladder import DEPTH

_TOLD_TOGETHER = 1000  # requests, of whose coming is told
_MOST_SAMPLES = 3000  # of the fleet's state
_LEAST_INTERVAL_S = 0.1
_SETTLE_S = 30.0  # longest wait for full precision after the last answer


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is simulated beside the traffic and the policy."""

    target: Target
    replicas: int = 1
    router: str = "least-loaded"
    cache: CacheConfig = field(default_factory=CacheConfig)
    limits: SchedulerConfig = field(default_factory=SchedulerConfig)
    slo: Slo = Slo()
    timeout_s: float = 120.0  # of a request
    slowdown: float = 1.0  # of steps, by what else runs on the machine


def check(fleet: Fleet, policy: Policy) -> None:
    """Raises MorphError where no server with this policy would start."""
    SimulatedEngine(_config(fleet, policy), fleet.target)


def _config(fleet: Fleet, policy: Policy) -> EngineConfig:
    return EngineConfig(
        fleet.target.model, policy, cache=fleet.cache, scheduler=fleet.limits, slo=fleet.slo
    )


def simulate(
    fleet: Fleet,
    schedule: Schedule,
    policy: Policy,
    name: str | None = None,
    on_requests: Callable[[int], None] = lambda _: None,
) -> Run:
    """The run of one policy; seconds count from the start of the schedule.

    `on_requests` is told now and then how many requests more have come.
    Raises MorphError where no server would start.
    """
    config = _config(fleet, policy)
    recorder = _Recorder(max(_LEAST_INTERVAL_S, schedule.duration_s / _MOST_SAMPLES))
    replicas = [
        Replica(config, fleet.target, fleet.timeout_s, fleet.slowdown, recorder.record)
        for _ in range(fleet.replicas)
    ]
    recorder.watch(replicas)
    with _no_garbage():
        outcomes = _serve(replicas, schedule, fleet.router, recorder, on_requests)
        recorder.settle(schedule.duration_s + fleet.timeout_s + _SETTLE_S)
    return Run(name or policy.name, 0.0, outcomes, recorder.in_order(), replicas=fleet.replicas)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Millions of records would be searched for cycles again and again; they have none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _serve(
    replicas: Sequence[Replica],
    schedule: Schedule,
    router_name: str,
    recorder: "_Recorder",
    on_requests: Callable[[int], None],
) -> list[Outcome]:
    router, alone = make_router(router_name), len(replicas) == 1
    outcomes: list[Outcome] = []
    for index, arrival in enumerate(schedule.arrivals):
        now_s = arrival.time_s
        recorder.record_until(now_s)
        for replica in replicas:
            if replica.next_s < now_s:
                replica.run_until(now_s)
        chosen = 0
        if not alone:
            loads = [replica.load() for replica in replicas]
            chosen = router.choose(loads, arrival.prompt_tokens + arrival.output_tokens)
        outcomes.append(replicas[chosen].submit(index, arrival))
        if len(outcomes) % _TOLD_TOGETHER == 0:
            on_requests(_TOLD_TOGETHER)
    on_requests(len(outcomes) % _TOLD_TOGETHER)
    return outcomes


class _Recorder:
    """Samples of the fleet's state at equal intervals, and at each swap."""

    def __init__(self, interval_s: float) -> None:
        self._states: list[State] = []
        self._replicas: Sequence[Replica] = ()
        self._interval_s = interval_s
        self._next_s = 0.0

    def watch(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas

    def in_order(self) -> list[State]:
        """Replicas run ahead of each other between two arrivals, and so do their swaps."""
        return sorted(self._states, key=lambda state: state.time)

    def record_until(self, time_s: float) -> None:
        while self._next_s <= time_s:
            for replica in self._replicas:
                replica.run_until(self._next_s)
                replica.catch_up(self._next_s)
            self.record(self._next_s)
            self._next_s += self._interval_s

    def settle(self, latest_s: float) -> None:
        """Goes on until every answer has ended and every layer is back, at most to `latest_s`."""
        while self._next_s < latest_s:
            self.record_until(self._next_s)
            if all(replica.is_idle for replica in self._replicas):
                return

    def record(self, time_s: float) -> None:
        self._states.append(self._state(time_s))

    def _state(self, time_s: float) -> State:
        """Sums over the replicas; layers are those of the replica that is furthest demoted."""
        states = [replica.engine.state() for replica in self._replicas]
        deepest = max(states, key=lambda s: sum(DEPTH[variant] for variant in s.layers))
        return State(
            time=time_s,
            layers=deepest.layers,
            swapping=deepest.swapping,
            ladder=deepest.ladder,
            block_tokens=deepest.block_tokens,
            blocks_used=sum(s.blocks_used for s in states),
            blocks_capacity=sum(s.blocks_capacity for s in states),
            blocks_full=sum(s.blocks_full for s in states),
            running=sum(s.running for s in states),
            waiting=sum(s.waiting for s in states),
            preemptions=sum(s.preemptions for s in states),
            swaps=sum(s.swaps for s in states),
            generated_tokens={
                v: sum(s.generated_tokens.get(v, 0) for s in states) for v in Variant
            },
        )
