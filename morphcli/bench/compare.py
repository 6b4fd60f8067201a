"""The same schedule against one policy after another, each on a server of its own."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from morphserve.configs.errors import ConfigError
from morphserve.configs.load import load_policy
from morphserve.morphcli.bench.client import Outcome, Plan, PlannedRequest
from morphserve.morphcli.bench.prompts import Prompts
from morphserve.morphcli.bench.replay import num_processes, replay
from morphserve.morphcli.bench.server import (
    Sampler,
    ServerOptions,
    free_port,
    running_server,
    served_model,
)
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.bench.warm_up import notes, warm_up
from morphserve.morphcli.traces.schedule import Schedule

_NAMES = {
    "full": "off",
    "morph": "balanced",
    "morph:performance": "performance",
    "morph:accuracy": "accuracy",
}
_REPLAY_STEP = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class Bench:
    """One comparison: what is sent, and to whom."""

    policies: tuple[str, ...]  # as the user writes them
    schedule: Schedule
    prompts: Prompts
    timeout_s: float  # per request
    settle_s: float  # longest wait for full precision after the last answer
    output: Path  # folder of the servers' logs
    servers: ServerOptions | None = None
    url: str | None = None  # bench this server instead of starting any
    api_key: str | None = field(default=None, repr=False)  # of that server
    graded: bool = False  # answers are held against references, and may end by themselves


def parse_policies(text: str) -> tuple[str, ...]:
    """Names from `full,static:all,morph`; raises ConfigError for one that does not exist."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--compare {text!r}: name each policy once, as in full,static:all,morph")
    for name in names:
        if name not in _NAMES and not name.startswith("static:"):
            choices = ", ".join([*_NAMES, "static:N", "static:all"])
            raise ConfigError(f"--compare: unknown policy {name!r}, choose from {choices}")
        load_policy(served_policy(name))
    return names


def served_policy(name: str) -> str:
    """What `morph serve --policy` calls the policy that a comparison calls `name`."""
    return _NAMES.get(name, name)


def run_policy(bench: Bench, policy: str, on_outcome: _REPLAY_STEP, name: str = "") -> Run:
    """Replay the schedule against `policy`; `on_outcome` is called as each request ends."""
    if bench.url is not None:
        return _run(bench, policy, bench.url, on_outcome)
    assert bench.servers is not None
    port = free_port()
    arguments = bench.servers.arguments(served_policy(policy), port)
    log = bench.output / f"server-{policy.replace(':', '-')}{name and f'-{name}'}.log"
    with running_server(arguments, port, log) as url:
        return _run(bench, policy, url, on_outcome)


def _run(bench: Bench, policy: str, url: str, on_outcome: _REPLAY_STEP) -> Run:
    plan = Plan(
        url,
        served_model(url, bench.api_key),
        bench.timeout_s,
        _planned(bench),
        bench.api_key,
        token_ids=bench.servers is not None,
        graded=bench.graded,
    )
    settle_s = 0.0 if policy.startswith("static:") else bench.settle_s
    with Sampler(url, bench.api_key) as sampler:
        plan = warm_up(plan, bench.prompts)
        _await_full_precision(sampler, settle_s)
        sampler.states.clear()
        processes = num_processes(plan.requests, os.cpu_count() or 1)
        epoch_s, outcomes = replay(plan, on_outcome, processes)
        _await_full_precision(sampler, settle_s)
    told = list(notes(plan, outcomes))
    forced = plan.dialect.forces_length
    return Run(policy, epoch_s, outcomes, sampler.states, forces_length=forced, notes=told)


def _planned(bench: Bench) -> list[PlannedRequest]:
    pairs = zip(bench.schedule.arrivals, bench.prompts.prompts, strict=True)
    return [
        PlannedRequest(i, arrival.time_s, prompt, arrival.prompt_tokens, arrival.output_tokens)
        for i, (arrival, prompt) in enumerate(pairs)
    ]


def _await_full_precision(sampler: Sampler, settle_s: float) -> None:
    deadline = time.monotonic() + settle_s
    while sampler.states and time.monotonic() < deadline:
        if all(layer == "full" for layer in sampler.states[-1].layers):
            return
        time.sleep(0.1)
