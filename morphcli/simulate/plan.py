"""The fewest replicas, and the least memory of each, with which a trace keeps its SLO."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import msgspec

from morphserve.configs.errors import ConfigError, OutOfBudget
from morphserve.configs.load import load_policy
from morphserve.configs.schema import SchedulerConfig, Slo
from morphserve.morphcli.bench.compare import served_policy
from morphserve.morphcli.bench.summary import meets, summarise
from morphserve.morphcli.simulate.fleet import Fleet, simulate
from morphserve.morphcli.traces.schedule import Schedule
from morphserve.quantize.manifest import Variant

_BUDGET_STEPS = 32  # between no memory and all of the device's: a budget is found to one of these
_LEAST_PATIENCE_S = 120.0


class Need(msgspec.Struct, frozen=True):
    """What one policy needs; None where even the most replicas miss the SLO."""

    policy: str
    replicas: int | None
    budget_bytes: int | None  # of each device, for weights and KV cache
    met_share: float  # of the offered requests, within the SLO: there, or with the most replicas
    ttft_p95_s: float | None
    tpot_p95_s: float | None
    demoted_token_share: float | None  # of the tokens, made while a layer was not at full precision


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    device: str  # all devices of one replica
    tensor_parallel: int  # devices of one replica
    device_bytes: int  # of each device's memory that may be used
    router: str
    limits: SchedulerConfig
    requests: int
    clipped_prompts: int
    clipped_outputs: int
    duration_s: float
    timeout_s: float | None  # after which a request is given up; None: never
    slo: Slo
    share: float  # of requests that must meet the SLO
    max_replicas: int
    needs: list[Need]


def make_plan(
    fleet: Fleet, schedule: Schedule, policies: Sequence[str], share: float, max_replicas: int
) -> Iterator[Need]:
    """What each policy needs, as it is found.

    Raises MorphError where a request is longer than is served, or no server would start.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"--share must lie above 0, at most 1, not {share:g}")
    if max_replicas < 1:
        raise ConfigError(f"--max-replicas must be at least 1, not {max_replicas}")
    _check_lengths(fleet, schedule)
    for policy in policies:
        yield _need(fleet, schedule, policy, share, max_replicas)


def usable_bytes(fleet: Fleet) -> int:
    """The most that weights and KV cache may take of each device."""
    target = fleet.target
    return fleet.cache.memory_budget or target.memory_bytes - target.reserved_bytes


def patience_s(slo: Slo, schedule: Schedule) -> float:
    """When a client gives up: twice what the SLO allows the longest answer, or never.

    So a request that is given up has missed the SLO before.
    """
    if slo.ttft_s is None or slo.tpot_s is None:
        return math.inf
    longest = max(arrival.output_tokens for arrival in schedule.arrivals)
    return max(_LEAST_PATIENCE_S, 2 * (slo.ttft_s + slo.tpot_s * longest))


def _check_lengths(fleet: Fleet, schedule: Schedule) -> None:
    # They would miss the SLO with any number of replicas, and left out they would make the plan
    # too small.
    asked, most = fleet.limits.max_model_len, fleet.target.max_position
    limit = most if asked is None else asked
    arrivals = schedule.arrivals
    too_long = sum(a.prompt_tokens + a.output_tokens > limit for a in arrivals)
    if not too_long:
        return
    room = max(limit - max(a.prompt_tokens for a in arrivals), limit // 4, 1)
    output = min(room, max(a.output_tokens for a in arrivals))
    instead = "choose a model that takes more" if limit >= most else "raise --max-model-len"
    raise ConfigError(
        f"{too_long} of {len(arrivals)} requests are longer than {limit} tokens, prompt and "
        f"output: cut them, as with --max-prompt {limit - output} --max-output {output}, or "
        f"{instead}"
    )


def _need(fleet: Fleet, schedule: Schedule, policy: str, share: float, max_replicas: int) -> Need:
    most, found = usable_bytes(fleet), dict[int, Need]()

    def holds(replicas: int) -> bool:
        found[replicas] = _simulated(fleet, schedule, policy, replicas, most)
        return found[replicas].met_share >= share

    replicas = _least(holds, max_replicas)
    if replicas is None:
        return msgspec.structs.replace(found[max_replicas], replicas=None, budget_bytes=None)
    return _with_less(fleet, schedule, found[replicas], share, most)


def _with_less(fleet: Fleet, schedule: Schedule, need: Need, share: float, most: int) -> Need:
    """With the least memory that holds, as does every step between it and `most`."""
    assert need.replicas is not None
    # From above and step by step: more memory admits more at once, which may well cost latency.
    for step in range(_BUDGET_STEPS - 1, 0, -1):
        budget = most * step // _BUDGET_STEPS
        try:
            less = _simulated(fleet, schedule, need.policy, need.replicas, budget)
        except OutOfBudget:
            break
        if less.met_share < share:
            break
        need = less
    return need


def _least(holds: Callable[[int], bool], most: int) -> int | None:
    """A number up to `most` that holds where one less does not; None if none is found.

    By doubling and bisection: the least one, if all above it hold too.
    """
    below, number = 0, 1
    while not holds(number):
        if number == most:
            return None
        below, number = number, min(2 * number, most)
    return _bisect(holds, below, number)


def _bisect(holds: Callable[[int], bool], below: int, number: int) -> int:
    """A number above `below` that holds where one less does not; `number` is known to hold."""
    while number - below > 1:
        middle = (below + number) // 2
        if holds(middle):
            number = middle
        else:
            below = middle
    return number


def _simulated(fleet: Fleet, schedule: Schedule, policy: str, replicas: int, budget: int) -> Need:
    """Raises OutOfBudget where no server would start with so little memory."""
    cache = replace(fleet.cache, memory_budget=budget)
    run = simulate(
        replace(fleet, replicas=replicas, cache=cache),
        schedule,
        load_policy(served_policy(policy)),
        policy,
    )
    met = sum(meets(outcome, fleet.slo) for outcome in run.outcomes)
    figures = summarise(run, fleet.slo, schedule.duration_s)
    tokens = run.states[-1].generated_tokens
    total = sum(tokens.values())
    return Need(
        policy=policy,
        replicas=replicas,
        budget_bytes=budget,
        met_share=met / len(run.outcomes),
        ttft_p95_s=figures.ttft_s.p95,
        tpot_p95_s=figures.tpot_s.p95,
        demoted_token_share=1 - tokens[Variant.FULL] / total if total else None,
    )
