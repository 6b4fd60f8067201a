"""The headline table, in words for people who see them for the first time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from morphserve.morphcli.bench.figures import (
    Answers,
    Interval,
    Percentiles,
    PolicySummary,
    ServerFigures,
)
from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.summary import show_s, show_slo

UNKNOWN = "–"  # what stands in place of a figure that is not known
_TIE = 0.02  # relative difference under which two figures are called equal


@dataclass(frozen=True, slots=True)
class Row:
    """One figure over all policies."""

    label: str
    cells: tuple[str, ...]  # in the order of the summary's policies
    best: int | None = None  # the cell that is better than all others, where better has a meaning
    is_detail: bool = False  # left out where few rows are wanted


def policy_title(policy: str) -> str:
    """What a policy is called above its column."""
    titles = {"full": "full precision", "static:all": "static INT4"}
    if policy.startswith("static:") and policy != "static:all":
        return f"static INT4, {policy.removeprefix('static:')} layers"
    return titles.get(policy, policy)


def in_repeats(policy: PolicySummary) -> str:
    """What follows a number of requests: ` in 3 repeats`; nothing for a single run."""
    return f" in {policy.repeats.count} repeats" if policy.repeats else ""


def table_rows(summary: Summary) -> list[Row]:
    """Every figure that the run can tell, most telling first."""
    build = _Rows(summary.policies)
    slo = show_slo(summary.settings.slo)
    offered = max(policy.offered for policy in summary.policies)
    build.add(
        f"of {offered} requests{in_repeats(summary.policies[0])}, missed the target ({slo})",
        _misses,
        lambda p: p.slo_misses,
    )
    for q, name in ((95, "p95"), (50, "p50"), (99, "p99")):
        _latency(build, f"{q} % of requests had their first token within", name, "ttft_s", q != 95)
    for q, name in ((95, "p95"), (50, "p50"), (99, "p99")):
        _latency(build, f"{q} % of answers took per further token at most", name, "tpot_s", q != 95)
    for q, name in ((50, "p50"), (95, "p95"), (99, "p99")):
        label = f"{q} % of gaps between tokens were at most"
        _latency(build, label, name, "itl_s", detail=True, none=UNKNOWN)
    _latency(build, "95 % of requests had their whole answer within", "p95", "e2e_s", detail=True)
    label = "95 % of requests were queued in the server for at most"
    _latency(build, label, "p95", "queue_s", detail=True, none=UNKNOWN)
    build.add(
        "output tokens per second",
        lambda p: f"{p.output_tokens_per_s:,.0f}",
        lambda p: -p.output_tokens_per_s,
    )
    build.add(
        "requests per second within the target",
        lambda p: f"{p.goodput_per_s:.2f}",
        lambda p: -p.goodput_per_s,
        detail=True,
    )
    build.add("refused / unfinished / failed requests", _unanswered, detail=True)
    _add_server_rows(build)
    build.add(
        "perplexity of what was served (lower is better)",
        lambda p: UNKNOWN if p.perplexity is None else f"{p.perplexity:.3f}",
        lambda p: p.perplexity,
    )
    _add_answers(build)
    return build.rows


class _Rows:
    def __init__(self, policies: Sequence[PolicySummary]) -> None:
        self.policies = policies
        self.rows: list[Row] = []

    def add(
        self,
        label: str,
        show: Callable[[PolicySummary], str],
        cost: Callable[[PolicySummary], float | None] = lambda _: None,
        *,
        detail: bool = False,
    ) -> None:
        cells = tuple(show(policy) for policy in self.policies)
        if any(cell != UNKNOWN for cell in cells):
            best = _best([cost(policy) for policy in self.policies])
            self.rows.append(Row(label, cells, best, detail))


def _best(costs: Sequence[float | None]) -> int | None:
    known = sorted(cost for cost in costs if cost is not None)
    if len(known) < 2 or math.isinf(known[0]):
        return None
    first, second = known[:2]
    if math.isfinite(second) and second - first <= _TIE * abs(second):
        return None
    return costs.index(first)


def _misses(policy: PolicySummary) -> str:
    between = policy.repeats.slo_miss_share if policy.repeats else None
    share = f"{policy.slo_misses} ({show_share(policy.slo_miss_share)})"
    return share + _between(between, show_share)


def _between(interval: Interval | None, show: Callable[[float], str]) -> str:
    """` [0.9–1.5 s]`; nothing for a single run."""
    if interval is None:
        return ""
    low, high = show(interval.low), show(interval.high)
    number, _, unit = low.rpartition(" ")
    return f" [{number if high.endswith(f' {unit}') else low}–{high}]"


def _unanswered(policy: PolicySummary) -> str:
    return f"{policy.refused} / {policy.unfinished} / {policy.failed}"


def _latency(
    build: _Rows, label: str, rank: str, field: str, detail: bool, none: str = "no answer"
) -> None:
    """`none` is what a percentile that is None means: never answered, or UNKNOWN."""

    def value(policy: PolicySummary) -> float | None:
        percentiles: Percentiles = getattr(policy, field)
        found: float | None = getattr(percentiles, rank)
        return found

    def show(policy: PolicySummary) -> str:
        found = value(policy)
        if found is None:
            return none
        between = None
        if policy.repeats is not None and rank == "p95":
            between = getattr(policy.repeats, f"{field.removesuffix('_s')}_p95_s", None)
        return show_s(found) + _between(between, show_s)

    def cost(policy: PolicySummary) -> float | None:
        found = value(policy)
        return math.inf if found is None and none != UNKNOWN else found

    build.add(label, show, cost, detail=detail)


def _add_server_rows(build: _Rows) -> None:
    def add(
        label: str,
        show: Callable[[ServerFigures], str],
        cost: Callable[[ServerFigures], float | None] = lambda _: None,
        detail: bool = False,
    ) -> None:
        build.add(
            label,
            lambda p: show(p.server) if p.server else UNKNOWN,
            lambda p: cost(p.server) if p.server else None,
            detail=detail,
        )

    each = ", per run" if any(p.repeats for p in build.policies) else ""
    add(
        f"preemptions (work thrown away and redone){each}",
        lambda s: show_count(s.preemptions),
        lambda s: s.preemptions,
    )
    add("KV cache capacity, tokens", _capacity)
    add("tokens made below full precision", lambda s: show_share(s.quantized_token_share))
    add("INT4 layers: mean per token / most", _layers, detail=True)
    add("all layers at full precision again after the burst", _full_again)
    add(
        f"times that layers were swapped again later{each}",
        lambda s: show_count(s.later_episodes),
        detail=True,
    )


def _capacity(server: ServerFigures) -> str:
    if server.kv_tokens_min == server.kv_tokens_max:
        return f"{server.kv_tokens_max:,}"
    return f"{server.kv_tokens_min:,}–{server.kv_tokens_max:,}"


def _layers(server: ServerFigures) -> str:
    mean = UNKNOWN if server.int4_layers_mean is None else f"{server.int4_layers_mean:.1f}"
    return f"{mean} / {server.int4_layers_max}"


def _full_again(server: ServerFigures) -> str:
    if server.full_again_s is not None:
        return f"after {show_s(server.full_again_s)}" if server.full_again_s else "by its end"
    if not server.quantized_layers_max:
        return "always"
    return f"no, {server.quantized_layers_at_end} swapped"


def _add_answers(build: _Rows) -> None:
    """What answers were worth, beside perplexity."""

    def add(
        label: str,
        value: Callable[[Answers], float | None],
        show: Callable[[float], str],
        detail: bool = False,
    ) -> None:
        def found(policy: PolicySummary) -> float | None:
            return None if policy.answers is None else value(policy.answers)

        def cell(policy: PolicySummary) -> str:
            known = found(policy)
            return UNKNOWN if known is None else show(known)

        def cost(policy: PolicySummary) -> float | None:
            known = found(policy)
            return None if known is None else -known

        build.add(label, cell, cost, detail=detail)

    build.add(
        "KL divergence from full precision, 10⁻³ nats per token",
        lambda p: UNKNOWN if p.kl is None else f"{1000 * p.kl:.2f}",
        lambda p: p.kl,
        detail=True,
    )
    add("answers with the same text as at full precision", lambda a: a.same_text, show_share, True)
    add("tokens that agree with full precision", lambda a: a.token_agreement, show_share, True)
    add(
        "tokens per answer before the first that differs",
        lambda a: a.same_prefix_tokens,
        lambda tokens: f"{tokens:.1f}",
        True,
    )
    add("F1 against references", lambda a: a.f1, show_score)
    add("ROUGE-L against references", lambda a: a.rouge_l, show_score)


def show_count(count: float) -> str:
    """`3`; of a mean `3.4`."""
    return f"{count:,.1f}".removesuffix(".0")


def show_score(score: float | None) -> str:
    """As papers do, in hundredths: `25.19`; a dash for None."""
    return UNKNOWN if score is None else f"{100 * score:.2f}"


def show_share(share: float | None) -> str:
    """`4.2 %`; a dash for None."""
    if share is None:
        return UNKNOWN
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"
