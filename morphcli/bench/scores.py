"""F1 and ROUGE-L of an answer against references, from 0 to 1.

Both look at words in lower case, without punctuation. Chinese and Japanese are written without
spaces: there each character is a word.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = {"a", "an", "the"}
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han characters
_WORD = re.compile(f"[{_NO_SPACES}]|[^\\s{_NO_SPACES}]+")


def f1(answer: str, references: Sequence[str]) -> float:
    """Of words, wherever they stand: the harmonic mean of how many of the answer's are wanted and
    how many of the wanted are there. Articles do not count. The best over all references."""
    return _best(_f1, _content(answer), [_content(reference) for reference in references])


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The same of the longest sequence of words that both have in one order, with gaps, articles
    among them."""
    return _best(_rouge_l, words(answer), [words(reference) for reference in references])


def words(text: str) -> list[str]:
    """`The cat's 2 hats.` as `the`, `cats`, `2`, `hats`."""
    plain = unicodedata.normalize("NFKC", text).lower()
    kept = (c for c in plain if not unicodedata.category(c).startswith(("P", "S")))
    return _WORD.findall("".join(kept))


def _content(text: str) -> list[str]:
    return [word for word in words(text) if word not in _ARTICLES]


def _best(
    score: Callable[[Sequence[str], Sequence[str]], float],
    answer: Sequence[str],
    references: Sequence[Sequence[str]],
) -> float:
    return max(score(answer, reference) for reference in references)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    common = (Counter(answer) & Counter(reference)).total()
    return _harmonic(common, answer, reference)


def _rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    return _harmonic(common_subsequence(answer, reference), answer, reference)


def _harmonic(common: int, answer: Sequence[str], reference: Sequence[str]) -> float:
    """Of common / len(answer) and common / len(reference); 1 if both are empty."""
    total = len(answer) + len(reference)
    return 2 * common / total if total else 1.0


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    A row of the usual table differs from its neighbour by 0 or 1, so a whole row is one integer,
    where bit i is 0 if the subsequence grows at word i of `one`; addition carries along it.
    """
    places: Counter[str] = Counter()
    for place, word in enumerate(one):
        places[word] |= 1 << place
    all_ones = (1 << len(one)) - 1
    row = all_ones
    for word in other:
        matches = row & places[word]
        row = ((row + matches) | (row - matches)) & all_ones
    return len(one) - row.bit_count()
