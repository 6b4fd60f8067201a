"""The headline table and the verdict, in words for people who see them for the first time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.summary import Percentiles, PolicySummary, ServerFigures, show_s

_NONE = "–"
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


def table_rows(summary: Summary) -> list[Row]:
    """Every figure that the run can tell, most telling first."""
    build = _Rows(summary.policies)
    slo = str(summary.settings.slo)
    build.add(f"requests that missed the target ({slo})", _misses, lambda p: p.slo_misses)
    for q, name in ((95, "p95"), (50, "p50"), (99, "p99")):
        _latency(build, f"{q} % of requests had their first token within", name, "ttft_s", q != 95)
    for q, name in ((95, "p95"), (50, "p50"), (99, "p99")):
        _latency(build, f"{q} % of answers took per further token at most", name, "tpot_s", q != 95)
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
        lambda p: _NONE if p.perplexity is None else f"{p.perplexity:.3f}",
        lambda p: p.perplexity,
    )
    _add_agreement(build, summary)
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
        if any(cell != _NONE for cell in cells):
            best = _best([cost(policy) for policy in self.policies])
            self.rows.append(Row(label, cells, best, detail))


def _best(costs: Sequence[float | None]) -> int | None:
    known = sorted(cost for cost in costs if cost is not None)
    if len(known) < 2 or known[1] - known[0] <= _TIE * abs(known[1]):
        return None
    return costs.index(known[0])


def _misses(policy: PolicySummary) -> str:
    return f"{policy.slo_misses} of {policy.offered} ({_share(policy.slo_miss_share)})"


def _unanswered(policy: PolicySummary) -> str:
    return f"{policy.refused} / {policy.unfinished} / {policy.failed}"


def _latency(build: _Rows, label: str, rank: str, field: str, detail: bool) -> None:
    def value(policy: PolicySummary) -> float | None:
        percentiles: Percentiles = getattr(policy, field)
        found: float | None = getattr(percentiles, rank)
        return found

    def show(policy: PolicySummary) -> str:
        found = value(policy)
        return "no answer" if found is None else show_s(found)

    build.add(label, show, value, detail=detail)


def _add_server_rows(build: _Rows) -> None:
    def add(
        label: str,
        show: Callable[[ServerFigures], str],
        cost: Callable[[ServerFigures], float | None] = lambda _: None,
        detail: bool = False,
    ) -> None:
        build.add(
            label,
            lambda p: show(p.server) if p.server else _NONE,
            lambda p: cost(p.server) if p.server else None,
            detail=detail,
        )

    add("preemptions (work thrown away and redone)", _preemptions, lambda s: s.preemptions)
    add("KV cache capacity, tokens", _capacity)
    add("tokens made while a layer was INT4", lambda s: _share(s.int4_token_share))
    add("INT4 layers: mean per token / most", _layers, detail=True)
    add("all layers at full precision again", _full_again)


def _preemptions(server: ServerFigures) -> str:
    return str(server.preemptions)


def _capacity(server: ServerFigures) -> str:
    if server.kv_tokens_min == server.kv_tokens_max:
        return f"{server.kv_tokens_max:,}"
    return f"{server.kv_tokens_min:,} – {server.kv_tokens_max:,}"


def _layers(server: ServerFigures) -> str:
    mean = _NONE if server.int4_layers_mean is None else f"{server.int4_layers_mean:.1f}"
    return f"{mean} / {server.int4_layers_max}"


def _full_again(server: ServerFigures) -> str:
    if server.full_again_s is not None:
        return f"{show_s(server.full_again_s)} after the burst"
    if not server.int4_layers_max:
        return "never left it"
    return f"no: {server.int4_layers_at_end} INT4 at the end"


def _add_agreement(build: _Rows, summary: Summary) -> None:
    if len(summary.policies) < 2 or not summary.same_text_as_first:
        return
    first = summary.policies[0].policy
    build.add(
        f"answers with the same text as {policy_title(first)}",
        lambda p: _NONE if p.policy == first else _share(summary.same_text_as_first.get(p.policy)),
        detail=True,
    )


def _share(share: float | None) -> str:
    if share is None:
        return _NONE
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the figures say about morphing, first sentence first."""

    won: bool
    sentences: tuple[str, ...]


def verdict(summary: Summary) -> Verdict | None:
    """Morph against full precision and static INT4; None if the comparison lacks either side."""
    by_name = {policy.policy: policy for policy in summary.policies}
    morph = next((p for name, p in by_name.items() if name.startswith("morph")), None)
    full = by_name.get("full")
    if morph is None or full is None:
        return None
    won, first = _against_full(morph, full)
    sentences = [first, *_cost(morph, full)]
    static = next((p for name, p in by_name.items() if name.startswith("static:")), None)
    if static is not None:
        sentences.append(_against_static(morph, static))
    faulty = [f"{policy_title(p.policy)}: {fault}" for p in summary.policies for fault in p.faults]
    if faulty:
        won = False
        sentences.insert(0, f"This run proves nothing ({'; '.join(faulty)}): run it again.")
    return Verdict(won, tuple(sentences))


def _against_full(morph: PolicySummary, full: PolicySummary) -> tuple[bool, str]:
    ours, theirs = morph.ttft_s.p95, full.ttft_s.p95
    times = f"{_first_token(ours)} against {_first_token(theirs)} at full precision"
    misses = f"{morph.slo_misses} of {morph.offered} requests missed the target against "
    misses += f"{full.slo_misses}"
    if full.slo_misses == morph.slo_misses == 0:
        return False, (
            "The burst did not bind: full precision kept the target for every request too, so "
            f"there was nothing to win. 95 % of first tokens came within {times}."
        )
    sooner = ours is not None and (theirs is None or ours < theirs)
    if morph.slo_misses < full.slo_misses and sooner:
        factor = f", {theirs / ours:.1f} times sooner" if ours and theirs else ""
        return (
            True,
            f"Morphing paid: {misses}, and 95 % of first tokens came within {times}{factor}.",
        )
    return False, (
        f"Morphing did not win here: {misses}, and 95 % of first tokens came within {times}."
    )


def _first_token(value: float | None) -> str:
    return "no answer at all" if value is None else show_s(value)


def _cost(morph: PolicySummary, full: PolicySummary) -> list[str]:
    server = morph.server
    if server is None:
        return []
    if not server.int4_layers_max:
        return ["It never swapped a layer."]
    price = (
        f"It made {_share(server.int4_token_share)} of the tokens with up to "
        f"{server.int4_layers_max} INT4 layers"
    )
    if morph.perplexity is not None and full.perplexity is not None:
        worse = morph.perplexity / full.perplexity - 1
        price += (
            f", which cost {100 * worse:.2f} % in perplexity "
            f"({morph.perplexity:.3f} against {full.perplexity:.3f})"
        )
    if server.full_again_s is not None:
        end = f"Every layer was back {show_s(server.full_again_s)} after the burst."
    else:
        end = f"{server.int4_layers_at_end} layers were still INT4 when the run ended."
    return [price + ".", end]


def _against_static(morph: PolicySummary, static: PolicySummary) -> str:
    text = (
        f"{policy_title(static.policy).capitalize()}".replace("int4", "INT4")
        + f" missed {static.slo_misses} (95 % within {_first_token(static.ttft_s.p95)})"
    )
    if static.perplexity is None or morph.perplexity is None:
        return text + "."
    relation = "worse" if static.perplexity > morph.perplexity else "no worse"
    return text + f", at a perplexity of {static.perplexity:.3f} all day: {relation} than morph's."
