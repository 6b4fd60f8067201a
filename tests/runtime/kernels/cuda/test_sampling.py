"""Tokens chosen on the device against the reference's, and what decides between them."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from morphserve.runtime.kernels import Draw
from morphserve.runtime.kernels.cuda import sampling
from morphserve.runtime.kernels.cuda.sampling import DeviceDraws, choose
from morphserve.runtime.kernels.drawing import kept

BLOCK = 64  # small, so that rows of a hundred logits have several
DTYPES = [torch.float32, torch.bfloat16]

# Masses are sums of float32: off by a few 1e-7 of themselves, and so is the place of a border
# between two tokens. Exponents are rounded as floats, too: where the likelihood is e^-20 by up to
# 2e-6 of it, which is 4e-15 of the whole.
TOLERANCE = 2e-6

# No share of likelihoods e^-n is exactly one of these, so that no rounding decides what is kept.
SHARES = [1e-6, 0.1234, 0.5713, 0.9007, 0.98765, 1.0]
PLAIN = Draw(temperature=1.0, min_p=0.0, top_k=0, top_p=1.0, uniform=0.0)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def infinite_exponents() -> Iterator[None]:
    """Of what is infinitely less likely: the interpreter's arithmetic would warn of them."""
    with np.errstate(over="ignore"):
        yield


def as_float32(draw: Draw) -> Draw:
    """The draw that a device gets, so that the reference decides about the same numbers."""
    numbers = draw._asdict() | {"top_k": 0}
    rounded = torch.tensor(list(numbers.values()), dtype=torch.float32).tolist()
    return Draw(*rounded)._replace(top_k=draw.top_k)


def on_device(draws: list[Draw], device: str, searches: int = 2) -> DeviceDraws:
    floats = {
        name: torch.tensor([getattr(d, name) for d in draws], dtype=torch.float32, device=device)
        for name in ("temperature", "min_p", "top_p", "uniform")
    }
    top_k = torch.tensor([d.top_k for d in draws], dtype=torch.int32, device=device)
    return DeviceDraws(**floats, top_k=top_k, searches=searches)


def drawn(rows: Tensor, draws: list[Draw], device: str, block: int = BLOCK) -> list[int]:
    tokens: list[int] = choose(rows.to(device), on_device(draws, device), block).tolist()
    return tokens


def check_places(rows: Tensor, draws: list[Draw], tokens: list[int]) -> None:
    for row, draw, token in zip(rows, draws, tokens, strict=True):
        shares = kept(row.float(), as_float32(draw)).double()
        shares /= shares.sum()
        assert shares[token] > 0, (draw, token)
        end = float(shares[: token + 1].sum())
        assert end - shares[token] - TOLERANCE <= draw.uniform <= end + TOLERANCE, (draw, token)


def some_draws(count: int, seed: int) -> list[Draw]:
    chance = random.Random(seed)
    return [
        Draw(
            temperature=chance.choice([0.01, 0.7, 1.0, 5.0]),
            min_p=chance.choice([0.0, 0.0, 0.0123, 0.345, 1.0]),
            top_k=chance.choice([0, 0, 1, 2, 7, 50, 1000]),
            top_p=chance.choice(SHARES),
            uniform=chance.random(),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 63, 64, 200])
def test_without_draws_the_first_of_the_greatest_is_chosen(
    dtype: torch.dtype, vocab: int, device: str
) -> None:
    logits = (torch.randn(5, vocab) * torch.tensor([[0.0], [-0.0], [1.0], [3.0], [9.0]])).to(dtype)
    logits[4] = logits[4].round()
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert choose(logits.to(device), None, BLOCK).tolist() == expected
    greedy = [PLAIN._replace(temperature=0.0, top_k=3, top_p=0.5)] * 5
    assert drawn(logits, greedy, device) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", [None, PLAIN, PLAIN._replace(top_k=5, top_p=0.9)])
def test_a_row_that_is_not_finite_gives_minus_one_wherever_it_is_broken(
    dtype: torch.dtype, draw: Draw | None, device: str
) -> None:
    logits = torch.zeros(6, 150, dtype=dtype)
    logits[:, 77] = 100.0
    logits[0, 0] = logits[1, 149] = float("nan")
    logits[2, 63], logits[3, 64] = float("inf"), float("-inf")
    logits[4, 1] = -float("nan")
    draws = draw and on_device([draw] * 6, device)
    assert choose(logits.to(device), draws, BLOCK).tolist() == [-1] * 5 + [77]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_drawn_where_its_number_lies_in_the_kept_mass(
    dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(1)
    scales = torch.tensor([0.3, 1.0, 5.0, 40.0]).repeat(3)[:, None]
    rows = torch.randn(12, 120) * scales + torch.linspace(-20, 20, 12)[:, None]
    rows[::3] = rows[::3].round()  # many equal ones
    rows, draws = rows.to(dtype), some_draws(12, seed=2)
    check_places(rows, draws, drawn(rows, draws, device))


def awkward_rows(dtype: torch.dtype) -> Tensor:
    lowest = torch.finfo(dtype).min
    rows = torch.zeros(7, 100)
    rows[1, ::2] = 1.0  # two values
    rows[2, 70] = 1e30  # one huge
    rows[3, 40:] = lowest  # as ruled out by min_tokens
    rows[4], rows[4, 5], rows[4, 98] = lowest, 1.0, 2.0
    rows[5] = torch.linspace(-1e-30, 1e-30, 100)  # different, all as likely
    rows[6] = torch.linspace(-1e38, 1e38, 100)
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "draw",
    [
        PLAIN._replace(top_k=45),
        PLAIN._replace(top_p=0.6123),
        PLAIN._replace(top_k=45, top_p=0.6123, min_p=0.1),
        PLAIN._replace(temperature=5.0, top_k=3, top_p=1e-6),
    ],
    ids=["top_k", "top_p", "all", "few"],
)
def test_awkward_rows_keep_what_the_reference_keeps(
    dtype: torch.dtype, draw: Draw, device: str
) -> None:
    rows, draws = [], []
    for row in awkward_rows(dtype):
        shares = kept(row.float(), as_float32(draw)).double()
        ids = shares.nonzero().flatten()
        places = (shares.cumsum(0) - shares / 2) / shares.sum()
        token = int(ids[-1])  # one more or less kept would move it
        rows.append(row)
        draws.append(draw._replace(uniform=float(places[token])))
    tokens = drawn(torch.stack(rows), draws, device)
    check_places(torch.stack(rows), draws, tokens)


def test_a_number_between_two_tokens_draws_the_latter(device: str) -> None:
    halves = [PLAIN._replace(uniform=uniform) for uniform in (0.0, 0.5 - 2**-20, 0.5)]
    assert drawn(torch.zeros(3, 2), halves, device) == [0, 0, 1]


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_no_temperature_makes_a_token_that_is_not_there(temperature: float, device: str) -> None:
    draw = PLAIN._replace(temperature=temperature, uniform=1 - 2**-24)
    logits = torch.tensor([[1.0, 3.0, 2.0, torch.finfo(torch.float32).min]])
    assert drawn(logits, [draw], device) == [1 if temperature < 1 else 2]


@pytest.mark.parametrize("searches", [0, 1, 2])
def test_tokens_come_as_often_as_they_are_likely(searches: int, device: str) -> None:
    torch.manual_seed(3)
    row, count = torch.randn(100).bfloat16(), 25
    asked = PLAIN._replace(
        temperature=0.6, top_k=20 * (searches == 2), top_p=0.9 if searches else 1.0
    )
    draws = [asked._replace(uniform=(i + 0.5) / count) for i in range(count)]
    rows = row.expand(count, -1).to(device)
    tokens = choose(rows, on_device(draws, device, searches), 128)
    found = torch.bincount(tokens.cpu(), minlength=100) / count
    shares = kept(row.float(), as_float32(asked))
    assert ((found - shares / shares.sum()).abs() <= 1 / count + TOLERANCE).all()


def test_neither_the_batch_nor_what_a_program_does_changes_a_token(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(4)
    wide, draws = torch.randn(3, 110).bfloat16(), some_draws(3, seed=5)
    logits = wide[:, :100]  # rows that lie apart
    together = drawn(logits, draws, device)
    assert together == [drawn(logits[[i]], [draws[i]], device)[0] for i in range(3)]
    monkeypatch.setattr(sampling, "NUM_PROGRAMS", 3)
    assert drawn(logits, draws, device) == together


def test_nothing_is_read_that_was_not_written(device: str) -> None:
    torch.manual_seed(6)
    logits, draws = torch.randn(4, 100), some_draws(4, seed=7)
    draws[2] = PLAIN._replace(temperature=0.0)
    expected = drawn(logits, draws, device)
    torch.use_deterministic_algorithms(True)  # then new memory is filled with NaN
    try:
        assert drawn(logits, draws, device) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_vocabulary_of_32768_in_blocks_of_full_size(device: str) -> None:
    torch.manual_seed(8)
    rows = (torch.randn(2, 32768) * 3).bfloat16()
    draws = [
        PLAIN._replace(top_p=0.95, uniform=0.77),
        PLAIN._replace(top_k=50, top_p=0.9, uniform=0.3),
    ]
    check_places(rows, draws, drawn(rows, draws, device, sampling.BLOCK))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_choice_heeds_what_its_inputs_hold_later(dtype: torch.dtype) -> None:
    vocab, count = 128256, 16
    rows = torch.zeros(count, vocab, dtype=dtype, device="cuda")
    draws = on_device([PLAIN] * count, "cuda")
    choose(rows, draws)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = choose(rows, draws)
    for seed in range(3):
        rows.copy_(torch.randn(count, vocab) * 4)
        asked = some_draws(count, seed)
        for name, values in zip(Draw._fields, zip(*asked, strict=True), strict=True):
            getattr(draws, name).copy_(torch.tensor(values))
        graph.replay()
        check_places(rows.cpu(), asked, tokens.tolist())
