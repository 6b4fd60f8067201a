"""Rotation and KV write on CUDA against the reference, over scrambled pages."""

import dataclasses

import pytest
import torch
from guarded import guarded_outputs
from kernel_batches import make_meta, page_items, rotations, scatter_pages
from placed_models import on_device
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, QKNorm
from morphserve.runtime.kernels.cuda.rope import rope_write_kv
from morphserve.runtime.kernels.reference import ReferenceKernels, split_pages

REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]
# Float32 rounds products that one machine adds unrounded; bfloat16 then takes a neighbour.
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2.0**-7, 1e-6)}
# (H, G, D, B): groups of heads, one head, as many KV heads; heads that are no power of two.
SHAPES = [
    (6, 2, 64, 16),
    (1, 1, 2, 8),
    (4, 4, 16, 8),
    (5, 1, 80, 32),
    (8, 2, 96, 16),
    (32, 8, 128, 64),
    (2, 1, 256, 8),
]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cuda_pages(cache: Tensor, shape: AttentionShape) -> Tensor:
    """The reference's pages in the layout of the CUDA kernels."""
    k, v = split_pages(cache, shape)
    return torch.cat([k.transpose(2, 3).flatten(1), v.flatten(1)], dim=1)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SHAPES)
def test_rotation_and_write_match_the_reference_and_touch_nothing_else(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, normed: bool, device: str
) -> None:
    shape = AttentionShape(*sizes, norm_eps=1e-6)
    contexts, new = [11, 70, 1], [5, 1, 1]
    pages = scatter_pages(contexts, shape.block_tokens)
    meta = on_device(device, make_meta(contexts, new, pages, shape.block_tokens))
    dim, heads = shape.head_dim, shape.num_heads + 2 * shape.num_kv_heads
    norms = ((torch.rand(dim, device=device) + 0.5).to(dtype) for _ in range(2))
    norm = QKNorm(*norms) if normed else None
    qkv = torch.randn(7, heads * dim, device=device).to(dtype)
    table = rotations(70, dim).to(device)
    size = (sum(map(len, pages)), page_items(shape))
    written, wanted = (torch.full(size, torch.nan, device=device).to(dtype) for _ in range(2))
    with guarded_outputs():
        q = rope_write_kv(qkv, written, meta, shape, table, norm)
    wanted_q = REFERENCE.rope_write_kv(qkv, wanted, meta, shape, table, norm)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(q, wanted_q, rtol=rtol, atol=atol)
    wanted = _cuda_pages(wanted, shape)
    torch.testing.assert_close(written, wanted, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_kept_to_the_bit(dtype: torch.dtype, device: str) -> None:
    shape = AttentionShape(2, 1, 8, 8, norm_eps=1e-6)
    qkv = torch.randn(1, 4 * 8, device=device).to(dtype)
    qkv[0, -2:] = torch.tensor([torch.inf, 1e-30])
    meta = on_device(device, make_meta([3], [1], [torch.tensor([0])], 8))
    cache = torch.zeros(1, page_items(shape), dtype=dtype, device=device)
    norm = QKNorm(*(torch.ones(8, dtype=dtype, device=device) for _ in range(2)))
    rope_write_kv(qkv, cache, meta, shape, rotations(3, 8).to(device), norm)
    assert torch.equal(cache.view(2, 8, 8)[1, 2], qkv[0, -8:])


def test_padding_is_written_nowhere_and_pages_may_lie_apart(device: str) -> None:
    shape = AttentionShape(4, 2, 16, 8, norm_eps=1e-6)
    meta = on_device(
        device, make_meta([3, 20], [3, 2], [torch.tensor([1]), torch.tensor([4, 0, 2])], 8)
    )
    meta.token_page[[1, 4]] = -1
    qkv = torch.randn(5, 8 * 16, device=device)
    memory = torch.full((7, 2 * page_items(shape)), torch.nan, device=device)
    before, apart = memory[0], memory[1:]
    cache = apart[:, : page_items(shape)]
    table = rotations(20, 16).to(device)
    q = rope_write_kv(qkv, cache, meta, shape, table, None)
    assert cache.isnan().logical_not().sum() == 3 * 2 * 2 * 16  # tokens, k and v, heads, channels
    assert before.isnan().all() and apart[:, page_items(shape) :].isnan().all()
    used = torch.tensor([0, 2, 3], device=device)
    wanted = torch.full_like(cache, torch.nan, memory_format=torch.contiguous_format)
    kept = dataclasses.replace(
        meta,
        **{
            name: getattr(meta, name)[used].contiguous()
            for name in ("positions", "token_page", "token_slot")
        },
    )
    wanted_q = REFERENCE.rope_write_kv(qkv[used], wanted, kept, shape, table, None)
    torch.testing.assert_close(q[used], wanted_q)
    torch.testing.assert_close(cache, _cuda_pages(wanted, shape), equal_nan=True)


def test_of_no_tokens_comes_nothing(device: str) -> None:
    shape = AttentionShape(4, 2, 16, 8, norm_eps=1e-6)
    meta = on_device(device, make_meta([3], [0], [torch.tensor([0])], 8))
    cache = torch.zeros(1, page_items(shape), device=device)
    q = rope_write_kv(
        torch.empty(0, 8 * 16, device=device), cache, meta, shape, rotations(3, 16).to(device), None
    )
    assert q.shape == (0, 4, 16)
    assert not cache.any()


def test_pages_may_lie_further_away_than_32_bits_count(device: str) -> None:
    shape = AttentionShape(2, 1, 8, 8, norm_eps=1e-6)
    size, apart = page_items(shape), 2**26
    memory = torch.empty(32 * apart + size, dtype=torch.bfloat16, device=device)  # mostly untouched
    cache = memory.as_strided((33, size), (apart, 1))
    cache[32] = 0
    meta = on_device(device, make_meta([1], [1], [torch.tensor([32])], 8))
    qkv = torch.ones(1, 4 * 8, dtype=torch.bfloat16, device=device)
    rope_write_kv(qkv, cache, meta, shape, rotations(1, 8).to(device), None)
    assert cache[32].count_nonzero() == 16
