"""The verdict: what the figures of a comparison say about morphing, won or lost."""

from dataclasses import dataclass

from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.summary import PolicySummary, show_s
from morphserve.morphcli.bench.table import policy_title, show_share


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
    misses = (
        f"{morph.slo_misses} of {morph.offered} requests missed the target against "
        f"{full.slo_misses} at full precision"
    )
    times = f"95 % had their first token {_within(ours)} (full precision: {_within(theirs)})"
    if full.slo_misses == morph.slo_misses == 0:
        return False, (
            "The burst did not bind: full precision kept the target for every request too, so "
            f"there was nothing to win; {times}."
        )
    sooner = ours is not None and (theirs is None or ours < theirs)
    if morph.slo_misses < full.slo_misses and sooner:
        factor = f", {theirs / ours:.1f} times sooner" if ours and theirs else ""
        return True, f"Morphing paid: {misses}, and {times}{factor}."
    return False, f"Morphing did not win here: {misses}, and {times}."


def _within(value: float | None) -> str:
    return "never (too few were answered)" if value is None else f"within {show_s(value)}"


def _cost(morph: PolicySummary, full: PolicySummary) -> list[str]:
    server = morph.server
    if server is None:
        return []
    if not server.int4_layers_max:
        return ["It never swapped a layer."]
    price = (
        f"It made {show_share(server.int4_token_share)} of the tokens with up to "
        f"{server.int4_layers_max} INT4 layers"
    )
    if morph.perplexity is not None and full.perplexity is not None:
        worse = 100 * (morph.perplexity / full.perplexity - 1)
        price += (
            f"; perplexity {morph.perplexity:.3f} against {full.perplexity:.3f} ({worse:+.2f} %)"
        )
    if server.full_again_s is not None:
        end = f"Every layer was back {show_s(server.full_again_s)} after the burst."
    else:
        end = f"{server.int4_layers_at_end} layers were still INT4 when the run ended."
    return [price + ".", end]


def _against_static(morph: PolicySummary, static: PolicySummary) -> str:
    title = policy_title(static.policy)
    text = f"{title[0].upper()}{title[1:]} missed {static.slo_misses} "
    text += f"(95 % {_within(static.ttft_s.p95)})"
    if static.perplexity is None or morph.perplexity is None:
        return text + "."
    relation = "worse" if static.perplexity > morph.perplexity else "no worse"
    return text + f", at a perplexity of {static.perplexity:.3f} all day: {relation} than morph's."
