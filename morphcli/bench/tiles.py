"""The few numbers that a reader of a report sees first: morph against full precision."""

from collections.abc import Callable
from dataclasses import dataclass

from morphserve.morphcli.bench.figures import PolicySummary
from morphserve.morphcli.bench.overview import base_perplexity, quality_loss
from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.summary import show_s
from morphserve.morphcli.bench.table import policy_title, show_share
from morphserve.morphcli.bench.verdict import is_clearly_sooner, misses_clearly_fewer


@dataclass(frozen=True, slots=True)
class Tile:
    """One number, what it is of, and what it was made from."""

    title: str
    number: str
    detail: str
    is_good: bool | None  # None: neither good nor bad


def headline_tiles(summary: Summary) -> tuple[str, list[Tile]]:
    """What is compared, and its tiles; none where a side is missing or the run is invalid.

    Of several morph policies it is the default one, else the first.
    """
    full = next((p for p in summary.policies if p.policy == "full"), None)
    morphs = [p for p in summary.policies if p.policy.startswith("morph")]
    if full is None or not morphs or any(p.faults for p in summary.policies):
        return "", []
    morph = next((p for p in morphs if p.policy == "morph"), morphs[0])
    tiles = [_first_token(morph, full), _misses(morph, full), _throughput(morph, full)]
    tiles += _quality(morph, summary)
    return f"{policy_title(morph.policy)} against full precision", tiles


def _first_token(morph: PolicySummary, full: PolicySummary) -> Tile:
    ours, theirs = morph.ttft_s.p95, full.ttft_s.p95
    detail = f"95 % within {_time(ours)}; at full precision {_time(theirs)}"
    is_good = _is_good(is_clearly_sooner, morph, full)
    if ours is None or theirs is None:
        return Tile("first token", _time(ours), detail, is_good)
    ratio = theirs / ours
    number = f"{ratio:.1f} × sooner" if ratio >= 1 else f"{1 / ratio:.1f} × later"
    return Tile("first token", number, detail, is_good)


def _time(value: float | None) -> str:
    return "never" if value is None else show_s(value)


def _is_good(
    is_clearly_better: Callable[[PolicySummary, PolicySummary], bool],
    morph: PolicySummary,
    full: PolicySummary,
) -> bool | None:
    """By a test of the verdict; None where it calls neither better."""
    if is_clearly_better(morph, full):
        return True
    return False if is_clearly_better(full, morph) else None


def _misses(morph: PolicySummary, full: PolicySummary) -> Tile:
    ours, theirs = morph.slo_miss_share, full.slo_miss_share
    detail = f"{show_share(ours)} of requests; at full precision {show_share(theirs)}"
    is_good = _is_good(misses_clearly_fewer, morph, full)
    return Tile("missed the target", _change(ours, theirs), detail, is_good)


def _change(ours: float, theirs: float) -> str:
    """`37 % fewer`; all of them and none at all are said only where they are true."""
    if not ours or not theirs:
        return "none" if not ours else show_share(ours)
    if ours == theirs:
        return "as many"
    change = 100 * abs(ours / theirs - 1)
    digits = next(d for d in range(9) if d == 8 or round(change, d) not in (0, 100))
    return f"{change:.{digits}f} % {'fewer' if ours < theirs else 'more'}"


def _throughput(morph: PolicySummary, full: PolicySummary) -> Tile:
    ours, theirs = morph.output_tokens_per_s, full.output_tokens_per_s
    detail = f"{ours:,.0f} output tokens/s; at full precision {theirs:,.0f}"
    if not theirs:
        return Tile("throughput", f"{ours:,.0f} tokens/s", detail, None)
    return Tile("throughput", f"{ours / theirs:.2f} ×", detail, None)


def _quality(morph: PolicySummary, summary: Summary) -> list[Tile]:
    base = base_perplexity(summary)
    loss = quality_loss(morph.perplexity, base)
    if loss is None:
        return []
    static = next((p for p in summary.policies if p.policy == "static:all"), None)
    other = quality_loss(static.perplexity if static else None, base)
    share = morph.server.quantized_token_share if morph.server else None
    detail = f"perplexity; {show_share(share)} of tokens below full precision"
    if other is not None:
        detail += f"; static INT4 {other:+.2f} %"
    return [Tile("quality loss", f"{loss:+.2f} %".replace("-", "−"), detail, None)]
