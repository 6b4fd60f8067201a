"""What the answers of each policy were worth, as rows of a table."""

from collections.abc import Callable

from morphserve.morphcli.bench.figures import Answers, PolicySummary
from morphserve.morphcli.bench.overview import base_perplexity, quality_loss
from morphserve.morphcli.bench.record import Summary
from morphserve.morphcli.bench.table import UNKNOWN, Row, show_score, show_share


def quality_rows(summary: Summary) -> list[Row]:
    """Every measure of quality that some policy has."""
    base = base_perplexity(summary)
    rows = [
        _row(summary, "perplexity", lambda p: _show(p.perplexity, "{:.3f}")),
        _row(
            summary,
            "perplexity over full precision",
            lambda p: _show(quality_loss(p.perplexity, base), "{:+.2f} %"),
        ),
        _row(
            summary,
            "KL divergence, 10⁻³ nats per token",
            lambda p: _show(None if p.kl is None else 1000 * p.kl, "{:.2f}"),
        ),
        _row(summary, "tokens below full precision", _below_full),
        _row(summary, "answers with the same text", _of(lambda a: show_share(a.same_text))),
        _row(
            summary,
            "tokens that agree with full precision",
            _of(lambda a: show_share(a.token_agreement)),
        ),
        _row(
            summary,
            "tokens per answer before the first that differs",
            _of(lambda a: _show(a.same_prefix_tokens, "{:.1f}")),
        ),
        _row(summary, "F1 against references", _of(lambda a: show_score(a.f1))),
        _row(summary, "ROUGE-L against references", _of(lambda a: show_score(a.rouge_l))),
    ]
    return [row for row in rows if any(cell != UNKNOWN for cell in row.cells)]


def _row(summary: Summary, label: str, show: Callable[[PolicySummary], str]) -> Row:
    return Row(label, tuple(show(policy) for policy in summary.policies))


def _show(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else form.format(value)


def _of(show: Callable[[Answers], str]) -> Callable[[PolicySummary], str]:
    return lambda policy: UNKNOWN if policy.answers is None else show(policy.answers)


def _below_full(policy: PolicySummary) -> str:
    return show_share(policy.server.quantized_token_share if policy.server else None)
