"""What a run amounts to: latency, misses, throughput, memory and precision."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from morphserve.configs.schema import Slo
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.figures import Percentiles, PolicySummary, ServerFigures
from morphserve.morphcli.bench.server import Mix, State
from morphserve.quantize.manifest import Variant

MAX_LAG_P99_S = 0.05  # a load generator later than this did not send the trace


def meets(outcome: Outcome, slo: Slo) -> bool:
    """Whether the request was answered to its end and within every target."""
    if outcome.error is not None:
        return False
    return _within(outcome.ttft_s, slo.ttft_s) and _within(outcome.tpot_s, slo.tpot_s)


def show_slo(slo: Slo) -> str:
    """`first token ≤ 2 s, per token ≤ 200 ms`."""
    named = (("first token", slo.ttft_s), ("per token", slo.tpot_s))
    return ", ".join(f"{name} ≤ {show_s(value)}" for name, value in named if value is not None)


def _within(value: float | None, target: float | None) -> bool:
    return target is None or (value is not None and value <= target)


def show_s(seconds: float) -> str:
    """`1.25 s`, `80 ms`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.0f} s" if seconds >= 99.5 else f"{seconds:.3g} s"


def percentile(values: Sequence[float], q: float) -> float:
    """Nearest rank: interpolating between two requests would report a latency nobody saw."""
    return sorted(values)[max(0, math.ceil(q / 100 * len(values)) - 1)]


def percentiles(values: Iterable[float | None]) -> Percentiles:
    """Of `values`, where None counts as infinitely long."""
    known = [math.inf if value is None else value for value in values]
    ranks = [percentile(known, q) if known else math.inf for q in (50, 95, 99)]
    return Percentiles(*(rank if math.isfinite(rank) else None for rank in ranks))


class Run(msgspec.Struct):
    """All that was recorded of one policy under one schedule."""

    policy: str
    started_epoch_s: float  # wall clock at second 0 of the schedule
    outcomes: list[Outcome]
    states: list[State]
    repeat: int = 0  # of the same schedule against the same policy, from 0
    rate: float = 1.0  # of a sweep: requests per second, over those of the schedule
    replicas: int = 1  # whose states are told together
    notes: list[str] = []  # what a reader has to know of how it was measured

    def at_s(self, state: State) -> float:
        """Seconds of the schedule at which `state` was read."""
        return state.time - self.started_epoch_s


def summarise(run: Run, slo: Slo, burst_end_s: float) -> PolicySummary:
    """The figures of `run`; `burst_end_s` is the second from which recovery is counted."""
    outcomes = run.outcomes
    finished = [o for o in outcomes if o.error is None]
    good = sum(meets(o, slo) for o in outcomes)
    refused = sum(o.status not in (0, 200) for o in outcomes)
    unfinished = sum(o.timed_out and o.status in (0, 200) for o in outcomes)
    start = min(o.intended_s for o in outcomes)
    end = max(o.intended_s + (o.e2e_s or 0.0) for o in outcomes)
    duration = max(end - start, 1e-9)
    lags = [o.lag_s for o in outcomes]
    return PolicySummary(
        policy=run.policy,
        offered=len(outcomes),
        finished=len(finished),
        refused=refused,
        unfinished=unfinished,
        failed=len(outcomes) - len(finished) - refused - unfinished,
        slo_misses=len(outcomes) - good,
        ttft_s=percentiles(o.ttft_s for o in outcomes),
        tpot_s=percentiles(o.tpot_s for o in finished if o.output_tokens > 1),
        e2e_s=percentiles(o.e2e_s for o in outcomes),
        itl_s=percentiles(gap for o in finished for gap in o.gaps_s),
        queue_s=percentiles(o.queue_s for o in outcomes if o.queue_s is not None),
        duration_s=duration,
        output_tokens_per_s=sum(o.output_tokens for o in finished) / duration,
        finished_per_s=len(finished) / duration,
        goodput_per_s=good / duration,
        lag_p50_s=percentile(lags, 50),
        lag_p99_s=percentile(lags, 99),
        lag_max_s=max(lags),
        faults=list(_faults(outcomes)),
        server=_server_figures(run, burst_end_s),
        repeat=run.repeat,
        rate=run.rate,
    )


def _faults(outcomes: Sequence[Outcome]) -> Iterator[str]:
    finished = [o for o in outcomes if o.error is None]
    late = percentile([o.lag_s for o in outcomes], 99)
    if late > MAX_LAG_P99_S:
        yield f"requests left up to {show_s(late)} late (P99)"
    if broken := sum(o.status in (0, 200) and not o.timed_out for o in outcomes) - len(finished):
        yield f"{broken} requests failed without a whole answer"
    # 429 and 503 are how a server under pressure turns requests away.
    if errors := sorted({o.status for o in outcomes} - {0, 200, 429, 503}):
        count = sum(o.status in errors for o in outcomes)
        yield f"{count} requests were answered with HTTP {', '.join(map(str, errors))}"
    if unknown := sum(not o.output_tokens for o in finished):
        yield f"{unknown} answers did not tell their number of tokens"
    # An answer whose text is kept is held against a reference, and may end by itself.
    forced = [o for o in finished if o.text is None]
    if wrong := sum(o.output_tokens not in (0, o.max_tokens) for o in forced):
        yield f"{wrong} answers had another length than asked for"


def _server_figures(run: Run, burst_end_s: float) -> ServerFigures | None:
    states = run.states
    if not states:
        return None
    first, last = states[0], states[-1]
    tokens = tokens_per_mix(states)
    total = sum(tokens.values())
    int4_layers = sum(mix.count(Variant.INT4) * n for mix, n in tokens.items())
    generated = last.num_generated - first.num_generated
    quantized = last.num_generated_below_full - first.num_generated_below_full
    capacities = [state.blocks_capacity * state.block_tokens for state in states]
    return ServerFigures(
        preemptions=last.preemptions - first.preemptions,
        swaps=last.swaps - first.swaps,
        quantized_token_share=quantized / generated if generated else None,
        quantized_layers_max=max(state.num_quantized for state in states),
        quantized_layers_at_end=last.num_quantized,
        # The layers of a fleet's states are of one replica, its tokens of all.
        int4_layers_mean=int4_layers / total if total and run.replicas == 1 else None,
        int4_layers_max=max(state.num_int4 for state in states),
        kv_tokens_min=min(capacities),
        kv_tokens_max=max(capacities),
        full_again_s=_full_again(run, burst_end_s),
        later_episodes=sum(start > burst_end_s for start, _ in _quantized_stretches(run)),
    )


def _full_again(run: Run, burst_end_s: float) -> float | None:
    stretches = _quantized_stretches(run)
    if not stretches or run.states[-1].num_quantized:
        return None
    ends = [end for start, end in stretches if start <= burst_end_s]
    return max([0.0, *(end - burst_end_s for end in ends)])


def _quantized_stretches(run: Run) -> list[tuple[float, float]]:
    """Start and end, in seconds of the schedule, of each time with any layer at INT8 or INT4.

    The end is the first sample without one, or the last sample of all.
    """
    stretches: list[tuple[float, float]] = []
    was_quantized = False
    for state in run.states:
        at_s = run.at_s(state)
        if was_quantized:
            stretches[-1] = (stretches[-1][0], at_s)
        elif state.num_quantized:
            stretches.append((at_s, at_s))
        was_quantized = state.num_quantized > 0
    return stretches


def tokens_per_mix(states: Sequence[State]) -> dict[Mix, int]:
    """Tokens generated at each rung of the ladder, from samples of the server's counters."""
    tokens: dict[Mix, int] = defaultdict(int)
    for before, after in zip(states, states[1:], strict=False):
        made = after.num_generated - before.num_generated
        if made > 0:
            tokens[before.mix] += made
    return dict(tokens)


def mean_perplexity(tokens: Mapping[Mix, int], perplexities: Mapping[Mix, float]) -> float | None:
    """Perplexity of a stream of which `tokens[mix]` tokens came from layers in that mix."""
    total = sum(tokens.values())
    if not total or not tokens.keys() <= perplexities.keys():
        return None
    mean = sum(n * math.log(perplexities[mix]) for mix, n in tokens.items()) / total
    return math.exp(mean)
