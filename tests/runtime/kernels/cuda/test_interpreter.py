"""The interpreter that other tests trust computes with bfloat16 as a GPU does."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _combine(a, b, product, total, count, rounds, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE), tl.arange(0, SIZE)
    place = rows[:, None] * SIZE + columns[None, :]
    x, y = tl.load(a + place), tl.load(b + place)
    result = tl.zeros((SIZE, SIZE), tl.float32)
    for _ in range(rounds):
        result = tl.dot(x, y, result)
    tl.store(product + place, result)
    tl.store(total + place, x + y)
    tl.store(count + place, (place % 300).to(tl.bfloat16))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_bfloat16_is_multiplied_added_and_rounded(device: str) -> None:
    a, b = (torch.randn(32, 32, device=device).bfloat16() for _ in range(2))
    product = torch.empty(32, 32, device=device)
    total, count = torch.empty_like(a), torch.empty_like(a)
    _combine[(1,)](a, b, product, total, count, 2, 32)
    torch.testing.assert_close(product, 2 * (a.float() @ b.float()), atol=1e-4, rtol=1e-5)
    assert torch.equal(total, a + b)
    assert torch.equal(count, (torch.arange(1024, device=device) % 300).bfloat16().view(32, 32))
