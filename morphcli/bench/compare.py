"""The same schedule against one policy after another, each on a server of its own."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from morphserve.configs.errors import ConfigError, MorphError
from morphserve.configs.load import load_policy
from morphserve.morphcli.bench.client import Outcome, Plan, PlannedRequest, Started
from morphserve.morphcli.bench.prompts import Prompts
from morphserve.morphcli.bench.server import (
    Sampler,
    ServerOptions,
    free_port,
    running_server,
    served_model,
)
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.traces.schedule import Schedule

_NAMES = {
    "full": "off",
    "morph": "balanced",
    "morph:performance": "performance",
    "morph:accuracy": "accuracy",
}
_WARM_UP_TOKENS = 8
_REPLAY_STEP = Callable[[Outcome], None]


class ReplayFailed(MorphError):
    """The load generator died, or not even the first request was answered."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One comparison: what is sent, and to whom."""

    policies: tuple[str, ...]  # as the user writes them, in the order of the runs
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
    model = served_model(url, bench.api_key)
    requests = _planned(bench)
    _warm_up(bench, url, model)
    with Sampler(url, bench.api_key) as sampler:
        plan = Plan(
            url,
            model,
            bench.timeout_s,
            requests,
            bench.api_key,
            token_ids=bench.servers is not None,
            graded=bench.graded,
        )
        started, outcomes = replay(plan, on_outcome)
        if not policy.startswith("static:"):
            _await_full_precision(sampler, bench.settle_s)
    return Run(policy, started.epoch_s, outcomes, sampler.states)


def _warm_up(bench: Bench, url: str, model: str) -> None:
    request = PlannedRequest(0, 0.0, bench.prompts.warm_up, 0, _WARM_UP_TOKENS)
    plan = Plan(url, model, bench.timeout_s, [request], bench.api_key)
    _, (outcome,) = replay(plan, lambda _: None)
    if outcome.error is not None:
        raise ReplayFailed(f"{url} did not answer the warm-up request: {outcome.error}")


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


def replay(plan: Plan, on_outcome: _REPLAY_STEP) -> tuple[Started, list[Outcome]]:
    """Send `plan` from a process of its own; outcomes in the order of the plan."""
    command = [sys.executable, "-m", "morphserve.morphcli.bench.client"]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert client.stdin is not None and client.stdout is not None
        with client.stdin as stdin:
            stdin.write(msgspec.json.encode(plan))
        outcomes: list[Outcome] = []
        started: Started | None = None
        with client.stdout as lines:
            for line in lines:
                message = msgspec.json.decode(line, type=Started | Outcome)
                if isinstance(message, Started):
                    started = message
                else:
                    outcomes.append(message)
                    on_outcome(message)
        if client.wait() or started is None or len(outcomes) != len(plan.requests):
            raise ReplayFailed(f"the load generator ended early (exit code {client.returncode})")
    finally:
        client.kill()
        client.wait()
    return started, sorted(outcomes, key=lambda outcome: outcome.index)
