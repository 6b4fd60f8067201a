"""A burst against any policies, by a rough imitation of servers: something to draw and look at."""

import random
from dataclasses import dataclass, field

import msgspec
from bench_runs import SLO, make_summary

from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.figures import (
    Answers,
    Interval,
    PolicySummary,
    PositionShare,
    Repeats,
)
from morphserve.morphcli.bench.record import LoadPoint, MixPerplexity, Summary
from morphserve.morphcli.bench.server import State
from morphserve.morphcli.bench.summary import Run, percentile, summarise
from morphserve.morphcli.traces.schedule import Burst, Schedule
from morphserve.quantize.manifest import Rung, Variant

POLICIES = ("full", "static:all", "static:4", "morph", "morph:performance", "morph:accuracy")
_TICK_S = 0.1
_BLOCKS, _BLOCKS_OF_LAYER, _BLOCK_TOKENS = 120, 14, 16
_MOST_INT4 = {
    "morph": 6,
    "morph:performance": 8,
    "morph:accuracy": 3,
    "static:all": 8,
    "static:4": 4,
}
_LOSS = {"full": 0, "static:all": 4.1, "static:4": 1.7, "morph": 0.6, "morph:performance": 1.1,
         "morph:accuracy": 0.2}  # fmt: skip


@dataclass(slots=True)
class _Server:
    policy: str
    num_layers: int
    num_int4: int = 0
    moving: dict[int, Variant] = field(default_factory=dict)
    waiting: list[Outcome] = field(default_factory=list)
    running: dict[int, tuple[Outcome, float]] = field(default_factory=dict)  # tokens made so far
    tokens: dict[Variant, float] = field(
        default_factory=lambda: {Variant.FULL: 0.0, Variant.INT8: 0.0, Variant.INT4: 0.0}
    )
    preemptions: int = 0
    swaps: int = 0

    @property
    def capacity(self) -> int:
        return _BLOCKS + _BLOCKS_OF_LAYER * self.num_int4 * 8 // self.num_layers

    @property
    def used(self) -> int:
        return sum(
            -(-(o.prompt_tokens + int(made)) // _BLOCK_TOKENS) for o, made in self.running.values()
        )

    def tick(self, now_s: float, number: int) -> None:
        self._swap(number)
        while self.waiting and self.used + 12 < self.capacity and len(self.running) < 32:
            outcome = self.waiting.pop(0)
            if outcome.ttft_s is None:
                outcome.ttft_s = now_s + 0.05 + outcome.prompt_tokens / 4000 - outcome.intended_s
            self.running[outcome.index] = (outcome, 1.0)
        pace = (3.0 + 0.2 * self.num_int4) / (1 + 0.04 * len(self.running))  # tokens a tick
        for index, (outcome, made) in list(self.running.items()):
            step = min(pace, outcome.max_tokens - made)
            self.tokens[Variant.INT4 if self.num_int4 else Variant.FULL] += step
            self.running[index] = (outcome, made + step)
            if made + step >= outcome.max_tokens:
                outcome.e2e_s = max(now_s + _TICK_S - outcome.intended_s, outcome.ttft_s or 0.0)
                outcome.status, outcome.output_tokens = 200, outcome.max_tokens
                outcome.error, outcome.timed_out = None, False
                del self.running[index]
        while self.used > self.capacity:
            outcome, _ = self.running.pop(max(self.running))
            self.waiting.insert(0, outcome)
            self.preemptions += 1

    def _swap(self, number: int) -> None:
        if self.moving:
            self.moving, self.swaps = {}, self.swaps + 1
            return
        most = _MOST_INT4.get(self.policy, 0) * self.num_layers // 8
        if self.policy.startswith("static"):
            self.num_int4 = most
        elif len(self.waiting) > 1 and self.num_int4 < most and number % 2 == 0:
            self.moving[self.num_int4] = Variant.INT4
            self.num_int4 += 1
        elif not self.waiting and self.num_int4 and number % 8 == 0 and self.used < 0.6 * _BLOCKS:
            self.num_int4 -= 1
            self.moving[self.num_int4] = Variant.FULL

    def state(self, time_s: float) -> State:
        return State(
            time=time_s,
            layers=[
                Variant.INT4 if i < self.num_int4 else Variant.FULL for i in range(self.num_layers)
            ],
            blocks_used=self.used,
            blocks_capacity=self.capacity,
            blocks_full=_BLOCKS,
            block_tokens=_BLOCK_TOKENS,
            running=len(self.running),
            waiting=len(self.waiting),
            preemptions=self.preemptions,
            generated_tokens={variant: int(made) for variant, made in self.tokens.items()},
            swaps=self.swaps,
            swapping=dict(self.moving),
            ladder=[Rung(layer, Variant.INT4) for layer in range(self.num_layers)],
        )


def scene_run(
    policy: str,
    *,
    repeat: int = 0,
    rate: float = 1.0,
    seconds: float = 72.0,
    per_second: float = 2.4,
    num_layers: int = 8,
) -> Run:
    """One policy under a burst in the middle of a calm; the same requests for every policy."""
    rng, now_s, outcomes = random.Random(7), 0.0, []
    while now_s < seconds:
        busy = 0.4 * seconds < now_s < 0.6 * seconds
        now_s += rng.expovariate(per_second * rate * (3.0 if busy else 1.0))
        outcomes.append(
            Outcome(len(outcomes), now_s, now_s + 0.001, rng.randint(40, 220),
                    rng.randint(20, 70), error="unfinished after 30 s", timed_out=True)
        )  # fmt: skip
    server, states, late = _Server(policy, num_layers), [], random.Random(repeat)
    coming = list(outcomes)
    for number in range(int((seconds + 12) / _TICK_S)):
        now_s = number * _TICK_S
        while coming and coming[0].intended_s <= now_s:
            outcome = coming.pop(0)
            if len(server.waiting) > 40:
                outcome.status, outcome.error, outcome.timed_out = 503, "too busy", False
            else:
                server.waiting.append(outcome)
        if late.random() > 0.04:  # a step that the machine lost
            server.tick(now_s, number)
        states.append(server.state(1000 + now_s))
    return Run(policy, 1000.0, outcomes, states, repeat, rate)


def scene(
    policies: tuple[str, ...] = POLICIES, *, repeats: int = 1, rates: tuple[float, ...] = (1.0,),
    **load: float,
) -> tuple[Summary, list[Run], Schedule]:  # fmt: skip
    """A comparison with everything that can be measured."""
    runs = [
        scene_run(policy, repeat=repeat, rate=rate, **load)  # type: ignore[arg-type]
        for rate in rates
        for repeat in range(repeats)
        for policy in policies
    ]
    main = [run for run in runs if run.rate == 1.0]
    firsts = [run for run in main if run.repeat == 0]
    summary, schedule = make_summary(firsts)
    seconds = load.get("seconds", 72.0)
    burst = Burst(0.4 * seconds, 0.6 * seconds, 2.0, 6.0)
    summary.trace = msgspec.structs.replace(summary.trace, burst=burst, duration_s=seconds)
    schedule = Schedule(schedule.arrivals, seconds)
    summary.runs = [summarise(run, SLO, burst.end_s) for run in main]
    for policy in [*summary.policies, *summary.runs]:
        policy.perplexity = 10 * (1 + _LOSS.get(policy.policy, 0.0) / 100)
    for policy in summary.policies:
        same = [run for run in summary.runs if run.policy == policy.policy]
        _add_quality(policy)
        policy.repeats = _repeats(same) if repeats > 1 else None
    half = [Variant.INT4] * 4 + [Variant.FULL] * 4
    summary.perplexities = [
        MixPerplexity([Variant.FULL] * 8, 10.0, 0.0),
        MixPerplexity(half, 10.17, 0.016),
        MixPerplexity([Variant.INT4] * 8, 10.41, 0.043),
    ]
    if len(rates) > 1:
        summary.curve = [_load_point(run) for run in runs if run.repeat == 0]
    return summary, runs, schedule


def _add_quality(policy: PolicySummary) -> None:
    loss = _LOSS.get(policy.policy, 0.0)
    policy.kl = 0.01 * loss
    policy.answers = Answers(
        tokens={},
        positions=[
            PositionShare(start, end, 400, min(1.0, loss / 4.1 * (0.8 + start / 80)))
            for start, end in ((0, 16), (16, 64), (64, 70))
        ],
        same_text=1 - loss / 6,
        token_agreement=1 - loss / 9,
        same_prefix_tokens=40 - 8 * loss,
        f1=0.41 - loss / 100,
        rouge_l=0.35 - loss / 100,
    )


def _repeats(runs: list[PolicySummary]) -> Repeats:
    def interval(values: list[float | None]) -> Interval | None:
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        margin = max(known) - min(known) + 0.001 * abs(known[0])
        return Interval(known[0] - margin, known[0] + margin)

    return Repeats(
        len(runs),
        interval([run.slo_miss_share for run in runs]),
        interval([run.ttft_s.p95 for run in runs]),
        interval([run.tpot_s.p95 for run in runs]),
        interval([run.output_tokens_per_s for run in runs]),
        interval([run.perplexity for run in runs]),
    )


def _load_point(run: Run) -> LoadPoint:
    found = summarise(run, SLO, 0.0)
    seconds = max(o.intended_s for o in run.outcomes)
    lost = [o.ttft_s if o.ttft_s is not None else float("inf") for o in run.outcomes]
    p95 = percentile(lost, 95)
    return LoadPoint(
        run.policy, run.rate, len(run.outcomes) / seconds, 1 - found.slo_miss_share,
        found.goodput_per_s, found.output_tokens_per_s, None if p95 == float("inf") else p95,
        found.tpot_s.p95,
    )  # fmt: skip
