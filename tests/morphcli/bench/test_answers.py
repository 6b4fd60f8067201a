"""What answers were worth: agreement with full precision, precision by position, grades."""

import pytest
from bench_runs import answered, make_run, make_summary, state, unanswered
from hypothesis import given
from hypothesis import strategies as st

from morphserve.morphcli.bench.answers import answers_of, fill_answers
from morphserve.morphcli.bench.client import Outcome
from morphserve.morphcli.bench.figures import Answers, PositionShare
from morphserve.morphcli.bench.references import Reference
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.bench.table import table_rows
from morphserve.quantize.manifest import Variant


def told(index: int, ids: list[int], *precisions: tuple[str, int], text: str = "") -> Outcome:
    """An answer of these tokens."""
    outcome = answered(index, ttft_s=0.1, tokens=len(ids))
    outcome.token_ids, outcome.precisions = ids, list(precisions) or [("full", len(ids))]
    counts = {name: sum(n for p, n in outcome.precisions if p == name) for name in ("full", "int4")}
    outcome.tokens_full, outcome.tokens_int4 = counts["full"], counts["int4"]
    outcome.text_sha256, outcome.text = str(ids), text or None
    return outcome


def judged(run: Run, reference: Run | None, wanted: tuple[Reference, ...] = ()) -> Answers:
    found = answers_of([run], reference, wanted)
    assert found is not None
    return found


def test_answers_agree_token_by_token_at_their_places() -> None:
    full = make_run("full", [told(0, [1, 2, 3, 4]), told(1, [5, 6])], [])
    morph = make_run("morph", [told(0, [1, 2, 9, 4]), told(1, [5, 6])], [])
    found = judged(morph, full)
    assert found.token_agreement == 5 / 6
    assert found.same_text == 0.5
    assert found.same_prefix_tokens == (2 + 2) / 2


def test_places_that_only_the_longer_answer_has_do_not_agree() -> None:
    full, morph = make_run("full", [told(0, [1, 2, 3, 4])], []), make_run("m", [told(0, [1])], [])
    for one, other in (full, morph), (morph, full):
        found = judged(one, other)
        assert (found.token_agreement, found.same_prefix_tokens) == (0.25, 1)


def test_only_requests_that_both_have_answered_are_compared() -> None:
    full = make_run("full", [told(0, [1]), unanswered(1, 503), told(2, [3])], [])
    morph = make_run("morph", [unanswered(0), told(1, [7]), told(2, [3])], [])
    found = judged(morph, full)
    assert (found.token_agreement, found.same_text) == (1, 1)
    assert found.tokens == {Variant.FULL: 2}


def test_without_ids_texts_still_tell() -> None:
    full = make_run("full", [answered(i, 0.1) for i in range(2)], [])
    other = make_run("server", [answered(i, 0.1) for i in range(2)], [])
    other.outcomes[0].text_sha256 = "another"
    found = judged(other, full)
    assert (found.same_text, found.token_agreement, found.same_prefix_tokens) == (0.5, None, None)
    assert (found.tokens, found.positions) == ({}, [])


def test_full_precision_is_compared_with_its_repeats_and_not_with_itself() -> None:
    runs = [make_run("full", [told(0, [1, last])], []) for last in (2, 2, 3)]
    assert judged(runs[0], runs[0]).token_agreement is None
    found = answers_of(runs, runs[0])
    assert found is not None and found.token_agreement == 3 / 4


def test_nothing_answered_is_worth_nothing() -> None:
    assert answers_of([make_run("full", [unanswered(0)], [])], None) is None


def test_precision_is_told_by_place_in_the_answer() -> None:
    long = told(0, [0] * 300, ("int4", 8), ("full", 92), ("int8", 100), ("full", 100))
    short = told(1, [0] * 20, ("full", 16), ("int4", 4))
    found = judged(make_run("morph", [long, short], []), None)
    assert found.positions == [
        PositionShare(0, 16, 32, 8 / 32),
        PositionShare(16, 64, 52, 4 / 52),
        PositionShare(64, 256, 192, 100 / 192),
        PositionShare(256, 300, 44, 0.0),
    ]
    assert found.tokens == {Variant.FULL: 208, Variant.INT4: 12, Variant.INT8: 100}


def test_stretches_that_no_answer_reaches_are_left_out() -> None:
    found = judged(make_run("morph", [told(0, [0] * 20)], []), None)
    assert [(share.start, share.end) for share in found.positions] == [(0, 16), (16, 20)]


RUNS = st.lists(
    st.lists(st.tuples(st.sampled_from(["full", "int8", "int4"]), st.integers(1, 300)), min_size=1),
    min_size=1,
    max_size=5,
)


@given(RUNS)
def test_every_token_is_counted_once_by_precision_and_once_by_place(
    answers: list[list[tuple[str, int]]],
) -> None:
    outcomes = [
        told(i, [0] * sum(n for _, n in precisions), *precisions)
        for i, precisions in enumerate(answers)
    ]
    found = judged(make_run("morph", outcomes, []), None)
    total = sum(outcome.output_tokens for outcome in outcomes)
    assert sum(found.tokens.values()) == sum(share.tokens for share in found.positions) == total
    below = sum(share.below_full * share.tokens for share in found.positions)
    assert below == pytest.approx(total - found.tokens.get(Variant.FULL, 0))


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=4))
def test_agreement_has_no_direction_and_is_whole_for_equal_answers(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    one = make_run("full", [told(i, ids) for i, (ids, _) in enumerate(pairs)], [])
    other = make_run("morph", [told(i, ids) for i, (_, ids) in enumerate(pairs)], [])
    there, back = judged(one, other), judged(other, one)
    assert there.token_agreement == back.token_agreement is not None
    assert there.same_prefix_tokens == back.same_prefix_tokens
    assert (there.token_agreement == 1) == all(a == b for a, b in pairs) == (there.same_text == 1)


def test_answers_are_graded_by_the_reference_of_their_request() -> None:
    wanted = (Reference("who?", ("Ada",)), Reference("when?", ("in 1843", "1843")))
    outcomes = [told(1, [1], text="1843"), told(0, [2], text="Charles")]
    found = judged(make_run("full", outcomes, []), None, wanted)
    assert (found.f1, found.rouge_l) == (0.5, 0.5)


def test_a_comparison_tells_the_worth_of_answers_beside_their_latency() -> None:
    states = [state(0.0, 0, 0), state(4.0, 0, 8)]
    runs = [
        make_run("full", [told(0, [1, 2], text="the red hat")], states),
        make_run("morph", [told(0, [1, 3], text="a hat")], states),
    ]
    summary, _ = make_summary(runs)
    summary.policies[0].kl, summary.policies[1].kl = 0.0, 0.00123
    fill_answers(summary.policies, runs, [Reference("what?", ("red hat",))])
    rows = {row.label: row.cells for row in table_rows(summary)}
    assert rows["KL divergence from full precision, 10⁻³ nats per token"] == ("0.00", "1.23")
    assert rows["tokens that agree with full precision"] == ("–", "50.0 %")
    assert rows["tokens per answer before the first that differs"] == ("–", "1.0")
    assert rows["F1 against references"] == ("100.00", "66.67")
    assert rows["ROUGE-L against references"] == ("80.00", "50.00")
