"""F1 and ROUGE-L, against values computed by hand and against what must hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.morphcli.bench.scores import common_subsequence, f1, rouge_l, words

WORDS = st.lists(st.sampled_from("red green blue cat dog 猫".split()), max_size=12)
TEXT = st.text(max_size=40)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "a cat sat", 1),  # case, articles and punctuation are no difference
        ("the cat sat on the mat", "a cat lay on a rug", 2 * 2 / (4 + 4)),  # cat, on
        ("yes yes yes", "yes", 2 * 1 / (3 + 1)),  # a word counts as often as both have it
        ("it is 7", "it is 8", 2 * 2 / 6),
        ("猫喜欢鱼", "猫吃鱼", 2 * 2 / (4 + 3)),  # a character is a word
        ("GPT-4 模型", "gpt4模型", 1),
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("the", "a", 1),  # neither says anything
    ],
)
def test_f1_is_what_is_computed_by_hand(answer: str, reference: str, expected: float) -> None:
    assert f1(answer, [reference]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "the CAT sat", 1),
        ("the cat sat on the mat", "a cat lay on a rug", 2 * 2 / (6 + 6)),  # cat … on
        ("mat the on", "on the mat", 2 * 1 / 6),  # order counts
        ("police killed the gunman", "police kill the gunman", 2 * 3 / 8),
        ("gunman the killed police", "police kill the gunman", 2 * 1 / 8),
        ("猫喜欢鱼", "猫吃鱼", 2 * 2 / (4 + 3)),
        ("dog", "cat", 0),
        ("", "cat", 0),
    ],
)
def test_rouge_l_is_what_is_computed_by_hand(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, [reference]) == pytest.approx(expected)


def test_the_best_of_several_references_counts() -> None:
    assert f1("in May", ["June", "may", "in may"]) == 1
    assert rouge_l("in May", ["June", "may"]) == pytest.approx(2 / 3)


def test_words_have_no_case_punctuation_or_width() -> None:
    assert words("The cat's 2 ＨＡＴＳ, $5!") == ["the", "cats", "2", "hats", "5"]


@given(TEXT, TEXT)
def test_scores_are_shares_without_a_direction(one: str, other: str) -> None:
    for score in f1, rouge_l:
        assert 0 <= score(one, [other]) == score(other, [one]) <= 1
        assert score(one, [one]) == 1


@given(WORDS, WORDS)
def test_answers_without_a_common_word_score_nothing(one: list[str], other: list[str]) -> None:
    answer, reference = " ".join(one), " ".join(word for word in other if word not in one)
    if answer or reference:
        assert f1(answer, [reference]) == rouge_l(answer, [reference]) == 0


@given(WORDS, WORDS)
def test_order_can_only_cost(one: list[str], other: list[str]) -> None:
    answer, reference = " ".join(one), " ".join(other)
    assert rouge_l(answer, [reference]) <= f1(answer, [reference])  # none of these is an article


@given(WORDS, WORDS)
def test_the_longest_common_subsequence_is_that_of_the_table(
    one: list[str], other: list[str]
) -> None:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else longer
    assert common_subsequence(one, other) == table[-1][-1]
