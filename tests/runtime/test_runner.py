"""Packing: every token of a batch stands where its sequence's blocks say."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.runner import pack
from morphserve.runtime.scheduler import Slice


@st.composite
def slices(draw: st.DrawFn, block_tokens: int) -> Slice:
    prompt = draw(st.lists(st.integers(0, 99), min_size=1, max_size=40))
    output = draw(st.lists(st.integers(100, 199), max_size=20))
    total = len(prompt) + len(output)
    end = draw(st.integers(1, total))
    num_blocks = draw(st.integers(-(-end // block_tokens), 62))
    blocks = draw(st.lists(st.integers(0, 2**31 - 1), min_size=num_blocks, max_size=num_blocks))
    request = Request("x", prompt, SamplingParams(max_tokens=99), 0.0, output=output, blocks=blocks)
    start = end - 1 if draw(st.booleans()) else draw(st.integers(0, end - 1))
    return Slice(request, start, end)


@settings(max_examples=100)
@given(st.data(), st.sampled_from([1, 3, 16]))
def test_every_token_is_packed_with_its_place(data: st.DataObject, block_tokens: int) -> None:
    batch = data.draw(st.lists(slices(block_tokens), min_size=1, max_size=5))
    tokens, meta, rows = pack(batch, block_tokens)
    places = [(piece, i) for piece in batch for i in range(piece.start, piece.end)]
    assert tokens.tolist() == [(p.request.prompt + p.request.output)[i] for p, i in places]
    assert meta.positions.tolist() == [i for _, i in places]
    assert meta.token_page.tolist() == [p.request.blocks[i // block_tokens] for p, i in places]
    assert meta.token_slot.tolist() == [i % block_tokens for _, i in places]
    counts = torch.tensor([0] + [piece.end - piece.start for piece in batch])
    assert meta.query_start.tolist() == counts.cumsum(0).tolist()
    ends = (counts.cumsum(0)[1:] - 1).tolist()
    assert rows.tolist() == [end for end, piece in zip(ends, batch, strict=True) if piece.samples]
    assert meta.context_len.tolist() == [piece.end for piece in batch]
    for row, piece in zip(meta.block_table.tolist(), batch, strict=True):
        blocks = piece.request.blocks
        assert row == blocks + [0] * (len(row) - len(blocks))


def test_a_batch_of_tokens_is_in_the_dtypes_that_kernels_read() -> None:
    request = Request("x", [1, 2], SamplingParams(max_tokens=1), 0.0, blocks=[5])
    tokens, meta, rows = pack([Slice(request, 0, 2)], 16)
    assert tokens.dtype == rows.dtype == torch.int64
    fields = (meta.positions, meta.token_page, meta.token_slot, meta.query_start, meta.context_len)
    for tensor in (*fields, meta.block_table):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
