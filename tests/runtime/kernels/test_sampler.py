"""The CPU's sampler against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morphserve.runtime.kernels import Draw
from morphserve.runtime.kernels.cpu import CpuKernels
from morphserve.runtime.kernels.drawing import kept
from morphserve.runtime.kernels.reference import ReferenceKernels

EXAMPLES = settings(max_examples=100)
CPU, REFERENCE = CpuKernels(), ReferenceKernels()
PLAIN = Draw(temperature=1.0, min_p=0.0, top_k=0, top_p=1.0, uniform=0.0)

# The C sampler sums floats, some hundred at a time: a sum is off by a few 1e-7 of itself, and so
# is the place of a border between two tokens. Its exponents are rounded as floats, too: where
# the likelihood is e^-20 by up to 2e-6 of it, which is 4e-15 of the whole.
TOLERANCE = 2e-6

# No share of likelihoods e^-n is exactly one of these, so that no rounding decides what is kept.
SHARES = st.sampled_from([1e-6, 0.1234, 0.5713, 0.9007, 0.98765, 1.0])
DRAWS = st.builds(
    Draw,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 1.9]),
    min_p=st.sampled_from([0.0, 0.0123, 0.345, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 1000]),
    top_p=SHARES,
    uniform=st.floats(0, 1, exclude_max=True),
)


@st.composite
def logits_of_some_size(draw: st.DrawFn, most: int = 3000) -> Tensor:
    """[rows, vocab], with and without equal ones."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    rows, vocab = draw(st.integers(1, 4)), draw(st.integers(1, most))
    logits = torch.randn(rows, vocab) * draw(st.sampled_from([0.0, 0.3, 1.0, 5.0]))
    return logits.round() if draw(st.booleans()) else logits


@EXAMPLES
@given(logits=logits_of_some_size())
def test_greedy_tokens_are_the_references_even_among_equals(logits: Tensor) -> None:
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert CPU.sample(logits, {}) == REFERENCE.sample(logits, {}) == expected


@EXAMPLES
@given(logits=logits_of_some_size(), draw=DRAWS)
def test_a_token_is_drawn_where_its_number_lies_in_the_kept_mass(
    logits: Tensor, draw: Draw
) -> None:
    tokens = CPU.sample(logits, dict.fromkeys(range(len(logits)), draw))
    for row, token in zip(logits, tokens, strict=True):
        assert token is not None
        shares = kept(row, draw).double()
        shares /= shares.sum()
        assert shares[token] > 0
        end = float(shares[: token + 1].sum())
        assert end - shares[token] - TOLERANCE <= draw.uniform <= end + TOLERANCE


@EXAMPLES
@given(logits=logits_of_some_size(most=300), draw=DRAWS)
def test_every_kept_token_has_its_share(logits: Tensor, draw: Draw) -> None:
    shares = kept(logits[0], draw).double()
    shares /= shares.sum()
    wide = (shares > 4 * TOLERANCE).nonzero().flatten()
    middles = (shares.cumsum(0) - shares / 2)[wide].tolist()
    draws = {i: draw._replace(uniform=middle) for i, middle in enumerate(middles)}
    assert CPU.sample(logits[:1].repeat(len(draws), 1), draws) == wide.tolist()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("draws", [{}, dict.fromkeys(range(3), PLAIN)], ids=["greedy", "drawn"])
def test_a_row_that_is_not_finite_gives_no_token_wherever_it_is_broken(
    draws: dict[int, Draw], broken: float
) -> None:
    whole = torch.randn(3, 2500)
    first, _, last = CPU.sample(whole, draws)
    for place in (0, 15, 16, 1023, 1024, 2499):
        logits = whole.clone()
        logits[1, place] = broken
        assert CPU.sample(logits, draws) == REFERENCE.sample(logits, draws) == [first, None, last]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e30, 1e300])
def test_no_temperature_makes_a_token_that_is_not_there(temperature: float) -> None:
    draw = PLAIN._replace(temperature=temperature, uniform=1 - 2**-53)
    logits = torch.tensor([[1.0, 3.0, 2.0, torch.finfo(torch.float32).min]])
    assert CPU.sample(logits, {0: draw}) == [1 if temperature < 1 else 2]


def test_neither_the_batch_nor_threads_change_a_token() -> None:
    logits = torch.randn(50, 5000)
    draws = {
        i: Draw(1.3, 0.001 * (i % 2), 900 * (i % 3), 1 - 0.1 * (i % 4), i / 50)
        for i in range(1, 50)
    }
    together, greedy = CPU.sample(logits, draws), CPU.sample(logits, {})
    for i in range(50):
        assert CPU.sample(logits[[i]], {0: draws[i]} if i else {}) == [together[i]]
    torch.set_num_threads(3)
    try:
        assert [CPU.sample(logits, draws) for _ in range(5)] == [together] * 5
        assert CPU.sample(logits, {}) == greedy
    finally:
        torch.set_num_threads(1)
