"""Rotation, KV write and attention on the CPU against the reference, over scrambled pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import cpu_pages, make_meta, page_items, rotations, scatter_pages
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, QKNorm
from morphserve.runtime.kernels.cpu import CpuKernels
from morphserve.runtime.kernels.reference import ReferenceKernels, split_pages

EXAMPLES = settings(max_examples=25)
DTYPES = [torch.float32, torch.bfloat16]
CPU, REFERENCE = CpuKernels(), ReferenceKernels()
GQA = AttentionShape(num_heads=6, num_kv_heads=2, head_dim=64, block_tokens=16, norm_eps=1e-6)

SHAPES = st.builds(
    lambda groups, share, half, block: AttentionShape(
        groups * share, groups, 2 * half, block, 1e-6
    ),
    groups=st.integers(1, 3),
    share=st.sampled_from([1, 2, 3, 5, 8]),
    half=st.sampled_from([4, 10, 16, 32, 40, 64, 128]),
    block=st.sampled_from([1, 5, 6, 16, 20, 32]),
)
# Of results of unit size. Float32: sums over at most 1240 tokens and 256 channels. Bfloat16 rounds
# queries and weights by up to 2^-9 = 0.002: a score is a sum of channels and moves by 0.001 as a
# rule, rarely by 0.004, so a weight by 0.006 at most, and values differ from their mean by up to 4.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.025}

# (tokens computed in the step, tokens before it) of each sequence
BEFORE = st.integers(0, 200) | st.integers(500, 1200)
SEQUENCES = st.lists(st.tuples(st.integers(1, 40), BEFORE), min_size=1, max_size=5)


def _unwritten_cache(num_pages: int, shape: AttentionShape, dtype: torch.dtype) -> Tensor:
    """Not a number where nothing was written: whoever reads it shows."""
    return torch.full((num_pages, page_items(shape)), torch.nan, dtype=dtype)


def _fill(cache: Tensor, pages: list[Tensor], contexts: list[int], shape: AttentionShape) -> None:
    """Random K and V of every token of each context, in the reference's layout."""
    meta = make_meta(contexts, contexts, pages, shape.block_tokens)
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    table = rotations(max(contexts), shape.head_dim)
    REFERENCE.rope_write_kv(torch.randn(sum(contexts), width), cache, meta, shape, table, None)


def _filled_cache(
    pages: list[Tensor], contexts: list[int], shape: AttentionShape, dtype: torch.dtype
) -> Tensor:
    """Random K and V of every token of each context, in the C kernels' layout."""
    cache = _unwritten_cache(sum(map(len, pages)), shape, dtype)
    _fill(cache, pages, contexts, shape)
    return cpu_pages(cache, shape)


@EXAMPLES
@given(shape=SHAPES, sequences=SEQUENCES, dtype=st.sampled_from(DTYPES), normed=st.booleans())
def test_rotation_and_write_match_the_reference(
    shape: AttentionShape, sequences: list[tuple[int, int]], dtype: torch.dtype, normed: bool
) -> None:
    new, contexts = [n for n, _ in sequences], [n + before for n, before in sequences]
    pages = scatter_pages(contexts, shape.block_tokens)
    meta = make_meta(contexts, new, pages, shape.block_tokens)
    dim = shape.head_dim
    norm = QKNorm(torch.rand(dim) + 0.5, torch.rand(dim) + 0.5) if normed else None
    qkv = torch.randn(sum(new), (shape.num_heads + 2 * shape.num_kv_heads) * dim)
    table = rotations(max(contexts), dim)
    written, wanted = (_unwritten_cache(sum(map(len, pages)), shape, dtype) for _ in range(2))
    q = CPU.rope_write_kv(qkv, written, meta, shape, table, norm)
    wanted_q = REFERENCE.rope_write_kv(qkv, wanted, meta, shape, table, norm)
    torch.testing.assert_close(q, wanted_q, rtol=1e-5, atol=1e-5)
    # A float32 difference in the last place may round to the neighbouring bfloat16.
    step = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    wanted = cpu_pages(wanted, shape)
    torch.testing.assert_close(written, wanted, rtol=step, atol=1e-5, equal_nan=True)


@EXAMPLES
@given(shape=SHAPES, sequences=SEQUENCES, dtype=st.sampled_from(DTYPES))
def test_attention_matches_the_reference(
    shape: AttentionShape, sequences: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    new, contexts = [n for n, _ in sequences], [n + before for n, before in sequences]
    pages = scatter_pages(contexts, shape.block_tokens)
    cache = _unwritten_cache(sum(map(len, pages)), shape, dtype)
    _fill(cache, pages, contexts, shape)
    meta = make_meta(contexts, new, pages, shape.block_tokens)
    q = torch.randn(sum(new), shape.num_heads, shape.head_dim)
    out = CPU.attention(q, cpu_pages(cache, shape), meta, shape)
    wanted = REFERENCE.attention(q, cache, meta, shape)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_tokens", [6, 16])
def test_chunks_of_a_prompt_do_not_change_a_bit(dtype: torch.dtype, block_tokens: int) -> None:
    shape = AttentionShape(6, 2, 64, block_tokens, 1e-6)
    length, cuts = 1100, [0, 1, 130, 131, 257, 530, 1099, 1100]
    pages = scatter_pages([length], block_tokens)
    cache = _filled_cache(pages, [length], shape, dtype)
    q = torch.randn(length, 6, 64)
    whole = CPU.attention(q, cache, make_meta([length], [length], pages, block_tokens), shape)
    for start, end in zip(cuts, cuts[1:], strict=False):
        part = make_meta([end], [end - start], pages, block_tokens)
        assert torch.equal(CPU.attention(q[start:end], cache, part, shape), whole[start:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_is_the_same_alone_and_among_seventeen(dtype: torch.dtype) -> None:
    contexts = [1 + 23 * i for i in range(17)]
    new = [min(context, 1 + i % 3) for i, context in enumerate(contexts)]
    pages = scatter_pages(contexts, GQA.block_tokens)
    cache = _filled_cache(pages, contexts, GQA, dtype)
    q = torch.randn(sum(new), GQA.num_heads, GQA.head_dim)
    together = CPU.attention(q, cache, make_meta(contexts, new, pages, 16), GQA)
    start = 0
    for context, count, own in zip(contexts, new, pages, strict=True):
        rows = slice(start, start := start + count)
        alone = CPU.attention(q[rows], cache, make_meta([context], [count], [own], 16), GQA)
        assert torch.equal(alone, together[rows])


def test_threads_do_not_change_a_bit() -> None:
    contexts, new = [1700, 400, 90, 17], [1, 64, 1, 17]
    pages = scatter_pages(contexts, GQA.block_tokens)
    cache = _filled_cache(pages, contexts, GQA, torch.bfloat16)
    meta, q = make_meta(contexts, new, pages, 16), torch.randn(sum(new), 6, 64)
    one = CPU.attention(q, cache, meta, GQA)
    torch.set_num_threads(3)
    try:
        assert torch.equal(CPU.attention(q, cache, meta, GQA), one)
    finally:
        torch.set_num_threads(1)


def test_rounded_weights_add_up_to_one() -> None:
    pages = scatter_pages([300], GQA.block_tokens)
    cache = _unwritten_cache(len(pages[0]), GQA, torch.bfloat16)
    _fill(cache, pages, [300], GQA)
    split_pages(cache, GQA)[1].fill_(1.5)
    out = CPU.attention(
        torch.randn(1, 6, 64), cpu_pages(cache, GQA), make_meta([300], [1], pages, 16), GQA
    )
    # Numerator and denominator are float32 sums of the same 300 weights in another order.
    torch.testing.assert_close(out, torch.full_like(out, 1.5), rtol=300 * 2.0**-24, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_key_shows_in_every_query_that_sees_it(dtype: torch.dtype) -> None:
    shape = AttentionShape(2, 1, 32, 16, 1e-6)
    pages = scatter_pages([40], 16)
    meta, cache = make_meta([40], [40], pages, 16), _unwritten_cache(3, shape, dtype)
    qkv = torch.randn(40, 4 * 32)
    qkv[5, 2 * 32] = torch.nan
    q = CPU.rope_write_kv(qkv, cache, meta, shape, rotations(40, 32), None)
    sound = CPU.attention(q, cache, meta, shape).isfinite().all(dim=1)
    assert sound.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_large_scores_do_not_overflow() -> None:
    pages = scatter_pages([40], GQA.block_tokens)
    cache = _unwritten_cache(3, GQA, torch.float32)
    _fill(cache, pages, [40], GQA)
    keys, values = split_pages(cache, GQA)
    page, slot, share = int(pages[0][1]), 5, GQA.num_heads // GQA.num_kv_heads
    # Its own key's score leads by ten thousands, where rounding moves a score by hundredths.
    q = keys[page, :, :, slot].repeat_interleave(share, 0).unsqueeze(0) * 1e4
    out = CPU.attention(q, cache, make_meta([40], [1], pages, 16), GQA)
    assert torch.equal(out.view(6, 64), values[page, :, slot].repeat_interleave(share, 0))
