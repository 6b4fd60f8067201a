"""The verdict: what the figures of a comparison say about morphing, won or lost."""

import math
from dataclasses import dataclass

from morphserve.morphcli.bench.figures import Interval, PolicySummary, ServerFigures
from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.summary import show_s
from morphserve.morphcli.bench.table import in_repeats, policy_title, show_count, show_share

# Differences up to these are called none.
_MISSES = 2  # requests
_MISS_SHARE = 0.02  # of the offered requests
_SOONER = 0.10  # of the 95th percentile of first tokens
_PERPLEXITY = 0.002  # relative


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the figures say about morphing, first sentence first."""

    won: bool
    sentences: tuple[str, ...]


def verdict(summary: Summary) -> Verdict | None:
    """Each morph policy against full precision and static INT4, or why the run proves nothing.

    None if no fault was found and the comparison lacks morph or full precision.
    """
    faults = [f"{policy_title(p.policy)}: {fault}" for p in summary.policies for fault in p.faults]
    if faults:
        return Verdict(False, (f"This run proves nothing ({'; '.join(faults)}): run it again.",))
    full = next((p for p in summary.policies if p.policy == "full"), None)
    static = next((p for p in summary.policies if p.policy.startswith("static:")), None)
    morphs = [p for p in summary.policies if p.policy.startswith("morph")]
    if full is None or not morphs:
        return None
    found = [_judge(morph, full, static) for morph in morphs]
    if len(morphs) > 1:
        found = [_named(v, morph) for v, morph in zip(found, morphs, strict=True)]
    return Verdict(any(v.won for v in found), tuple(s for v in found for s in v.sentences))


def _named(found: Verdict, policy: PolicySummary) -> Verdict:
    first, *others = found.sentences
    return Verdict(found.won, (f"{policy_title(policy.policy)}: {first}", *others))


def _judge(morph: PolicySummary, full: PolicySummary, static: PolicySummary | None) -> Verdict:
    won, first = _against_full(morph, full)
    sentences = [first, *_cost(morph, full)]
    if static is not None:
        sentences.append(_against_static(morph, static))
    return Verdict(won, tuple(sentences))


def _against_full(morph: PolicySummary, full: PolicySummary) -> tuple[bool, str]:
    figures = _figures(morph, full)
    if full.slo_misses == morph.slo_misses == 0:
        return False, (
            "The burst did not bind: full precision kept the target for every request too, so "
            f"there was nothing to win; {figures}."
        )
    if morph.server is None or not morph.server.quantized_layers_max:
        return False, f"No layer was swapped, so no difference is morphing's: {figures}."
    better = _clearly_better(morph, full)
    if _clearly_better(full, morph):
        outcome = "won by one measure and lost by the other" if better else "did not win here"
        return False, f"Morphing {outcome}: {figures}."
    if not better:
        return False, f"There is no clear difference: {figures}."
    ours, theirs = morph.ttft_s.p95, full.ttft_s.p95
    factor = f", {theirs / ours:.1f} times sooner" if ours and theirs and ours < theirs else ""
    return True, f"Morphing paid: {figures}{factor}."


def _clearly_better(one: PolicySummary, other: PolicySummary) -> bool:
    """By more than runs of the same policy differ, in missed targets or in first tokens.

    Where there are repeats, their confidence intervals must not meet either.
    """
    return misses_clearly_fewer(one, other) or is_clearly_sooner(one, other)


def misses_clearly_fewer(one: PolicySummary, other: PolicySummary) -> bool:
    """Whether `one` missed fewer targets, by more than chance."""
    a, b = one.repeats, other.repeats
    fewer = other.slo_misses - one.slo_misses > max(_MISSES, _MISS_SHARE * one.offered)
    return fewer and (a is None or b is None or _lies_below(a.slo_miss_share, b.slo_miss_share))


def is_clearly_sooner(one: PolicySummary, other: PolicySummary) -> bool:
    """Whether the 95th percentile of first tokens of `one` is lower, by more than chance."""
    a, b = one.repeats, other.repeats
    p95, other_p95 = (math.inf if p is None else p for p in (one.ttft_s.p95, other.ttft_s.p95))
    sooner = p95 < (1 - _SOONER) * other_p95
    return sooner and (a is None or b is None or _lies_below(a.ttft_p95_s, b.ttft_p95_s))


def _lies_below(one: Interval | None, other: Interval | None) -> bool:
    """An unknown interval is above all others: some run had no answer at that rank."""
    return one is not None and (other is None or one.high < other.low)


def _figures(morph: PolicySummary, full: PolicySummary) -> str:
    return (
        f"{morph.slo_misses} of {morph.offered} requests{in_repeats(morph)} missed the target "
        f"against {full.slo_misses} at full precision, and 95 % had their first token "
        f"{_within(morph.ttft_s.p95)} (full precision: {_within(full.ttft_s.p95)})"
    )


def _within(value: float | None) -> str:
    return "never (too few were answered)" if value is None else f"within {show_s(value)}"


def _cost(morph: PolicySummary, full: PolicySummary) -> list[str]:
    server = morph.server
    if server is None or not server.quantized_layers_max:
        return []
    price = (
        f"It made {show_share(server.quantized_token_share)} of the tokens with up to "
        f"{_layers(server)}"
    )
    if morph.perplexity is not None and full.perplexity is not None:
        worse = 100 * (morph.perplexity / full.perplexity - 1)
        price += (
            f"; perplexity {morph.perplexity:.3f} against {full.perplexity:.3f} ({worse:+.2f} %)"
        )
    if server.full_again_s is not None:
        end = f"Every layer was back {_after_burst(server.full_again_s)}."
    else:
        end = f"{server.quantized_layers_at_end} layers were still swapped when the run ended."
    if server.later_episodes:
        number = show_count(server.later_episodes)
        times = "once" if number == "1" else f"{number} times"
        times += " per run" if morph.repeats else ""
        end += f" It swapped again later, {times}."
    return [price + ".", end]


def _layers(server: ServerFigures) -> str:
    if server.quantized_layers_max == server.int4_layers_max:
        return f"{server.int4_layers_max} INT4 layers"
    return f"{server.quantized_layers_max} layers at INT8 or INT4, {server.int4_layers_max} at INT4"


def _after_burst(seconds: float) -> str:
    return f"{show_s(seconds)} after the burst" if seconds else "by the end of the burst"


def _against_static(morph: PolicySummary, static: PolicySummary) -> str:
    title = policy_title(static.policy)
    text = f"{title[0].upper()}{title[1:]} missed {static.slo_misses} "
    text += f"(95 % {_within(static.ttft_s.p95)})"
    if static.perplexity is None or morph.perplexity is None:
        return text + "."
    relation = _relation(static.perplexity, morph.perplexity)
    return text + f", at a perplexity of {static.perplexity:.3f} all day: {relation}."


def _relation(static: float, morph: float) -> str:
    if abs(static / morph - 1) < _PERPLEXITY:
        return "no measurable difference from morph's"
    return f"{'worse' if static > morph else 'better'} than morph's"
