"""What answers were worth: the precision of their tokens by position, and how far they agree with
full precision and with references."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from statistics import fmean

from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.figures import Answers, PolicySummary, PositionShare
from morphserve.morphcli.bench.references import Reference
from morphserve.morphcli.bench.scores import f1, rouge_l
from morphserve.morphcli.bench.summary import Run
from morphserve.quantize.manifest import Variant

# Where stretches of an answer begin. INT4 costs most in the first tokens, which all others follow.
POSITIONS = (0, 16, 64, 256)

_Pair = tuple[Outcome, Outcome]  # the answer judged, and the same request's at full precision


def answers_of(
    runs: Sequence[Run], reference: Run | None, wanted: Sequence[Reference] = ()
) -> Answers | None:
    """The answers of one policy in all its runs; None if there were none.

    `reference` is a run at full precision of the same requests; a run is not compared with itself.
    `wanted` holds what the answer of each request should be.
    """
    answers = [outcome for run in runs for outcome in _finished(run)]
    if not answers:
        return None
    others = [run for run in runs if run is not reference]
    pairs = [] if reference is None else [p for run in others for p in _pairs(run, reference)]
    told = [pair for pair in pairs if all(outcome.token_ids for outcome in pair)]
    graded = [(outcome.text, wanted[outcome.index].answers) for outcome in answers if wanted]
    return Answers(
        tokens=_tokens(answers),
        positions=_positions(answers),
        same_text=_mean(float(ours.text_sha256 == full.text_sha256) for ours, full in pairs),
        token_agreement=_agreement(told),
        same_prefix_tokens=_mean(float(_same_prefix(*_ids(pair))) for pair in told),
        f1=_mean(f1(text or "", answers) for text, answers in graded),
        rouge_l=_mean(rouge_l(text or "", answers) for text, answers in graded),
    )


def fill_answers(
    policies: Iterable[PolicySummary], runs: Sequence[Run], wanted: Sequence[Reference]
) -> None:
    """The answers of each policy, held against the first run at full precision."""
    reference = next((run for run in runs if run.policy == "full"), None)
    for policy in policies:
        own = [run for run in runs if run.policy == policy.policy]
        policy.answers = answers_of(own, reference, wanted)


def _finished(run: Run) -> Iterator[Outcome]:
    return (outcome for outcome in run.outcomes if outcome.error is None)


def _pairs(run: Run, reference: Run) -> list[_Pair]:
    """Answers to the same request that both runs brought to an end."""
    others = {outcome.index: outcome for outcome in _finished(reference)}
    known = (o for o in _finished(run) if o.text_sha256 is not None)  # a simulated one has no text
    return [(o, others[o.index]) for o in known if o.index in others]


def _ids(pair: _Pair) -> tuple[list[int], list[int]]:
    ours, full = pair
    return ours.token_ids or [], full.token_ids or []


def _agreement(pairs: Sequence[_Pair]) -> float | None:
    """Of all places; one that only the longer of two answers has is no agreement."""
    same, places = 0, 0
    for ours, full in map(_ids, pairs):
        same += sum(a == b for a, b in zip(ours, full, strict=False))
        places += max(len(ours), len(full))
    return same / places if places else None


def _same_prefix(ours: Sequence[int], full: Sequence[int]) -> int:
    places = enumerate(zip_longest(ours, full))
    return next((place for place, (a, b) in places if a != b), len(ours))


def _tokens(answers: Iterable[Outcome]) -> dict[Variant, int]:
    """By precision, of answers that tell it; INT8 is what full precision and INT4 leave."""
    tokens: Counter[Variant] = Counter()
    for answer in answers:
        if answer.tokens_full is not None and answer.tokens_int4 is not None:
            tokens[Variant.FULL] += answer.tokens_full
            tokens[Variant.INT4] += answer.tokens_int4
            tokens[Variant.INT8] += answer.output_tokens - answer.tokens_full - answer.tokens_int4
    return {variant: count for variant, count in tokens.items() if count}


def _positions(answers: Iterable[Outcome]) -> list[PositionShare]:
    below, total, longest = Counter[int](), Counter[int](), 0
    for answer in answers:
        for precision, start, end in _placed_runs(answer):
            longest = max(longest, end)
            for begin, stop in _STRETCHES:
                inside = max(0, min(end, stop) - max(start, begin))
                total[begin] += inside
                below[begin] += inside if precision != Variant.FULL.value else 0
    return [
        PositionShare(begin, min(stop, longest), total[begin], below[begin] / total[begin])
        for begin, stop in _STRETCHES
        if total[begin]
    ]


_STRETCHES = tuple(zip(POSITIONS, (*POSITIONS[1:], 2**62), strict=True))


def _placed_runs(answer: Outcome) -> Iterator[tuple[str, int, int]]:
    """Precision, first place and the place after the last, of each run of tokens."""
    start = 0
    for precision, count in answer.precisions or ():
        yield precision, start, start + count
        start += count


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None
