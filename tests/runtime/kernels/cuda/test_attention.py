"""Paged attention on the GPU, or interpreted, against the reference over scrambled pages."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import cuda_pages, make_meta, page_items, rotations, scatter_pages
from torch import Tensor

from morphserve.runtime.kernels import AttentionShape, BatchMeta
from morphserve.runtime.kernels.cuda.attention import attention
from morphserve.runtime.kernels.cuda.splits import plan_splits
from morphserve.runtime.kernels.reference import ReferenceKernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = ReferenceKernels()
# Of results of unit size. Bfloat16 rounds weights by up to 2^-9 and the result once more; where few
# tokens weigh, both show in full.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.02}


def _shape(heads: int, groups: int, dim: int, block: int) -> AttentionShape:
    return AttentionShape(heads, groups, dim, block, 1e-6)


SMALL = _shape(4, 2, 16, 8)
SHAPES = [
    _shape(8, 2, 128, 32),
    _shape(9, 3, 64, 16),
    _shape(7, 1, 80, 64),
    _shape(16, 1, 96, 8),
    _shape(2, 2, 256, 32),
    _shape(3, 1, 6, 16),
]


class Batch:
    """K and V of every token of each context; whatever else the pages hold is not a number."""

    def __init__(
        self,
        shape: AttentionShape,
        contexts: list[int],
        new: list[int],
        dtype: torch.dtype = torch.bfloat16,
        size: float = 1.0,
    ) -> None:
        pages = scatter_pages(contexts, shape.block_tokens)
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        everything = make_meta(contexts, contexts, pages, shape.block_tokens)
        num_pages = max(1, sum(map(len, pages)))
        self.shape = shape
        self.meta = make_meta(contexts, new, pages, shape.block_tokens)
        self.cache = torch.full((num_pages, page_items(shape)), torch.nan, dtype=dtype)
        table = rotations(max(contexts), shape.head_dim)
        kv = torch.randn(sum(contexts), width) * size
        REFERENCE.rope_write_kv(kv, self.cache, everything, shape, table, None)
        heads = (sum(new), shape.num_heads, shape.head_dim)
        self.q = (torch.randn(heads) * size).to(dtype)

    def wanted(self) -> Tensor:
        return REFERENCE.attention(self.q, self.cache, self.meta, self.shape)

    def attend(self) -> Tensor:
        meta = on_device(self.meta)
        cache = cuda_pages(self.cache, self.shape).to(DEVICE)
        plan = plan_splits(meta, self.shape)
        return attention(self.q.to(DEVICE), cache, meta, plan, self.shape).cpu()

    def check(self) -> None:
        tolerance = TOLERANCE[self.q.dtype]
        torch.testing.assert_close(self.attend(), self.wanted(), rtol=tolerance, atol=tolerance)


def on_device(meta: BatchMeta) -> BatchMeta:
    return BatchMeta(
        meta.positions.to(DEVICE),
        meta.token_page.to(DEVICE),
        meta.token_slot.to(DEVICE),
        meta.query_start.to(DEVICE),
        meta.context_len.to(DEVICE),
        meta.block_table.to(DEVICE),
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_matches_the_reference(shape: AttentionShape, dtype: torch.dtype) -> None:
    Batch(shape, [1, 64, 65, 137, 32], [1] * 5, dtype).check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_and_decodes_in_one_batch_match_the_reference(
    shape: AttentionShape, dtype: torch.dtype
) -> None:
    Batch(shape, [40, 9, 101, 2], [40, 1, 34, 2], dtype).check()


def test_a_long_context_is_read_by_many_programs() -> None:
    batch = Batch(SMALL, [1500, 3], [1, 1])
    first = plan_splits(on_device(batch.meta), SMALL).first_item.tolist()
    assert first == [0, 24, 25]
    batch.check()
