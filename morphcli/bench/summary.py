"""What a run amounts to: latency, misses, throughput, memory and precision."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from morphserve.configs.errors import ConfigError
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.server import State

MAX_LAG_P99_S = 0.05  # a load generator later than this did not send the trace


class Slo(msgspec.Struct, frozen=True):
    """Targets that a request meets or misses; None: no target."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, outcome: Outcome) -> bool:
        """Whether the request was answered to its end and within every target."""
        if outcome.error is not None:
            return False
        return _within(outcome.ttft_s, self.ttft_s) and _within(outcome.tpot_s, self.tpot_s)

    def __str__(self) -> str:
        named = (("first token", self.ttft_s), ("per token", self.tpot_s))
        return ", ".join(f"{name} ≤ {show_s(value)}" for name, value in named if value is not None)


def _within(value: float | None, target: float | None) -> bool:
    return target is None or (value is not None and value <= target)


def show_s(seconds: float) -> str:
    """`1.25 s`, `80 ms`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.0f} s" if seconds >= 99.5 else f"{seconds:.3g} s"


def parse_slo(text: str) -> Slo:
    """Targets from `ttft=2s,tpot=200ms`; either may be left out."""
    targets: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(ttft|tpot)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", part)
        if match is None:
            raise ConfigError(f"--slo {text!r}: write for example ttft=2s,tpot=200ms")
        targets[f"{match[1]}_s"] = float(match[2]) / (1000 if match[3] == "ms" else 1)
    return Slo(**targets)


class Percentiles(msgspec.Struct, frozen=True):
    """None: the request at that rank was never answered, or there is none."""

    p50: float | None
    p95: float | None
    p99: float | None


def percentile(values: Sequence[float], q: float) -> float:
    """Nearest rank: interpolating between two requests would report a latency nobody saw."""
    return sorted(values)[max(0, math.ceil(q / 100 * len(values)) - 1)]


def percentiles(values: Iterable[float | None]) -> Percentiles:
    """Of `values`, where None counts as infinitely long."""
    known = [math.inf if value is None else value for value in values]
    ranks = [percentile(known, q) if known else math.inf for q in (50, 95, 99)]
    return Percentiles(*(rank if math.isfinite(rank) else None for rank in ranks))


class Run(msgspec.Struct):
    """All that was recorded of one policy."""

    policy: str
    started_epoch_s: float  # wall clock at second 0 of the schedule
    outcomes: list[Outcome]
    states: list[State]

    def at_s(self, state: State) -> float:
        """Seconds of the schedule at which `state` was read."""
        return state.time - self.started_epoch_s


class ServerFigures(msgspec.Struct, frozen=True):
    """What the server's own state tells of a run. Shares from 0 to 1."""

    preemptions: int
    swaps: int
    int4_token_share: float | None  # generated while at least one layer was INT4; None: no token
    int4_layers_mean: float | None  # over generated tokens
    int4_layers_max: int
    int4_layers_at_end: int
    kv_tokens_min: int  # capacity of the KV cache
    kv_tokens_max: int
    full_again_s: float | None  # first seen, from the end of the burst; None: never left, not back


class PolicySummary(msgspec.Struct):
    """The figures of one policy."""

    policy: str
    offered: int
    finished: int
    refused: int  # answered with an HTTP error
    unfinished: int  # ran into the timeout
    failed: int  # anything else
    slo_misses: int  # of the offered requests
    ttft_s: Percentiles  # over offered requests
    tpot_s: Percentiles  # over finished requests
    e2e_s: Percentiles  # over offered requests
    duration_s: float  # from the first send to the last token
    output_tokens_per_s: float
    finished_per_s: float
    goodput_per_s: float  # requests within the SLO
    lag_p50_s: float
    lag_p99_s: float
    lag_max_s: float
    wrong_lengths: int  # finished requests with another number of tokens than planned
    server: ServerFigures | None  # None: the server gives no state
    perplexity: float | None = None  # of the precisions served, weighted by tokens

    @property
    def slo_miss_share(self) -> float:
        return self.slo_misses / self.offered

    @property
    def faults(self) -> list[str]:
        """Reasons for which the run proves nothing; empty for a valid run."""
        faults = []
        if self.lag_p99_s > MAX_LAG_P99_S:
            faults.append(f"requests left up to {show_s(self.lag_p99_s)} late (P99)")
        if self.wrong_lengths:
            faults.append(f"{self.wrong_lengths} answers had another length than asked for")
        return faults


def summarise(run: Run, slo: Slo, burst_end_s: float) -> PolicySummary:
    """The figures of `run`; `burst_end_s` is the second from which recovery is counted."""
    outcomes = run.outcomes
    finished = [o for o in outcomes if o.error is None]
    good = sum(slo.met_by(o) for o in outcomes)
    refused = sum(o.status not in (0, 200) for o in outcomes)
    unfinished = sum(o.timed_out for o in outcomes)
    start = min(o.sent_s for o in outcomes)
    end = max((o.sent_s + (o.e2e_s or 0.0) for o in outcomes), default=start)
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
        duration_s=duration,
        output_tokens_per_s=sum(o.output_tokens for o in finished) / duration,
        finished_per_s=len(finished) / duration,
        goodput_per_s=good / duration,
        lag_p50_s=percentile(lags, 50),
        lag_p99_s=percentile(lags, 99),
        lag_max_s=max(lags),
        wrong_lengths=sum(o.output_tokens != o.max_tokens for o in finished),
        server=_server_figures(run, burst_end_s),
    )


def _server_figures(run: Run, burst_end_s: float) -> ServerFigures | None:
    states = run.states
    if not states:
        return None
    first, last = states[0], states[-1]
    tokens = tokens_per_level(states)
    total = sum(tokens.values())
    generated = last.generated_tokens - first.generated_tokens
    generated_int4 = last.generated_tokens_int4 - first.generated_tokens_int4
    capacities = [state.blocks_capacity * state.block_tokens for state in states]
    return ServerFigures(
        preemptions=last.preemptions - first.preemptions,
        swaps=last.swaps - first.swaps,
        int4_token_share=generated_int4 / generated if generated else None,
        int4_layers_mean=sum(k * n for k, n in tokens.items()) / total if total else None,
        int4_layers_max=max(state.num_int4 for state in states),
        int4_layers_at_end=last.num_int4,
        kv_tokens_min=min(capacities),
        kv_tokens_max=max(capacities),
        full_again_s=_full_again(run, burst_end_s),
    )


def _full_again(run: Run, burst_end_s: float) -> float | None:
    if not any(state.num_int4 for state in run.states):
        return None
    calm = (run.at_s(state) for state in run.states if not state.num_int4)
    return next((at_s - burst_end_s for at_s in calm if at_s >= burst_end_s), None)


def tokens_per_level(states: Sequence[State]) -> dict[int, int]:
    """Tokens generated while k layers were INT4, from samples of the server's counters."""
    tokens: dict[int, int] = defaultdict(int)
    for before, after in zip(states, states[1:], strict=False):
        made = after.generated_tokens - before.generated_tokens
        if made > 0:
            tokens[before.num_int4] += made
    return dict(tokens)


def mean_perplexity(tokens: Mapping[int, int], perplexities: Mapping[int, float]) -> float | None:
    """Perplexity of a stream of which `tokens[k]` tokens came from k INT4 layers."""
    total = sum(tokens.values())
    if not total or not tokens.keys() <= perplexities.keys():
        return None
    mean = sum(n * math.log(perplexities[level]) for level, n in tokens.items()) / total
    return math.exp(mean)
