"""What the requests in the engine ask for now, read in one pass over them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from morphserve.configs.schema import Slo
from morphserve.runtime.request import Request
from morphserve.runtime.signals import Urgent

_MOST_WAITING = 64  # requests that one look reads, from the head of the queue


@dataclass(frozen=True, slots=True)
class Load:
    """Of the running requests."""

    num_decodes: int  # that are past their prompt, at least one if any runs
    context_tokens: int  # of these together
    prefill_tokens: int  # that the others still have to compute
    growth: int  # blocks they will take beyond those they hold, over the horizon
    tpot_target_s: float | None  # the tightest


def running_load(running: Sequence[Request], horizon: int, block_tokens: int, slo: Slo) -> Load:
    """`slo` stands in for targets that a request does not name."""
    num_decodes = context = prefill = growth = 0
    tightest = float("inf")
    for request in running:
        tokens = request.num_tokens
        missing = tokens - request.num_computed
        if missing > 1:
            prefill += missing
        else:
            num_decodes += 1
            context += tokens
        ahead = min(tokens + horizon, request.max_tokens)
        growth += max(0, -(-ahead // block_tokens) - len(request.blocks))
        target = request.demands.slo.tpot_s or slo.tpot_s
        if target is not None and target < tightest:
            tightest = target
    if running and not num_decodes:
        num_decodes, context = len(running), prefill  # what they come to once they are past it
    target = None if tightest == float("inf") else tightest
    return Load(num_decodes, context, prefill, growth, target)


def most_urgent(
    waiting: Iterable[Request],
    load: Load,
    slo: Slo,
    step_tokens: int,
    step_s: float,
    now_s: float,
) -> Urgent | None:
    """Of the first 64 waiting requests with a target, the one with the least time left.

    Each gets its first token after the prefill of all before it and its own. That goes
    `step_tokens` at a time, in steps of `step_s`. Preempted requests that have begun to answer have
    had their first token.
    """
    ahead = load.prefill_tokens
    least, urgent = float("inf"), None
    for request in islice(waiting, _MOST_WAITING):
        ahead += request.num_tokens
        target = request.demands.slo.ttft_s or slo.ttft_s
        if target is None or request.output:
            continue
        age, steps = now_s - request.arrival_s, -(-ahead // step_tokens)
        if target - age - steps * step_s < least:
            least, urgent = target - age - steps * step_s, Urgent(age, steps, target)
    return urgent
