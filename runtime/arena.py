"""The one byte buffer that holds weights and KV cache, and typed views of it."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from morphserve.runtime.device import Device
from morphserve.runtime.memory import MemoryPlan


class Arena:
    """`plan.num_bytes` of a device's memory that are allocated once and never grow."""

    def __init__(self, plan: MemoryPlan, device: Device) -> None:
        self.plan = plan
        self.bytes = device.allocate(plan.num_bytes)
        page_bytes = plan.sizes.page_bytes
        self._pages = self.bytes.view(plan.num_pages, page_bytes)
        # Bytes are copied in the largest words that a page is made of: a GPU's thread takes one.
        word = torch.int64 if page_bytes % torch.int64.itemsize == 0 else torch.uint8
        self._words = self._pages.view(word)

    def span(self, offset: int, num_bytes: int) -> Tensor:
        """Bytes offset..offset + num_bytes, as uint8."""
        return self.bytes[offset : offset + num_bytes]

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor over the bytes that start at `offset`."""
        count = dtype.itemsize
        for size in shape:
            count *= size
        return self.span(offset, count).view(dtype).view(*shape)

    def cache(self, layer: int, dtype: torch.dtype) -> Tensor:
        """The KV cache of a layer, indexed by page0: [pages, elements of a page]."""
        return self._pages[layer * self.plan.run_blocks :].view(dtype)

    def copy_blocks(self, moves: Mapping[int, int]) -> None:
        """Copies the content of blocks, all layers: old page0 -> new page0, no overlap.

        One copy per run of adjacent blocks: it takes no memory, and on a GPU nothing is uploaded
        and nobody waits.
        """
        assert moves.keys().isdisjoint(moves.values())
        for old, new, count in _runs(moves):
            self._blocks(new, count).copy_(self._blocks(old, count))

    def _blocks(self, page0: int, count: int) -> Tensor:
        """Adjacent blocks: [layers, words of `count` pages]."""
        words = self._words.shape[1]
        return self._words.as_strided(
            (self.plan.sizes.num_layers, count * words),
            (self.plan.run_blocks * words, 1),
            self._words.storage_offset() + page0 * words,
        )


def _runs(moves: Mapping[int, int]) -> Iterator[tuple[int, int, int]]:
    """(old, new, count) of blocks that lie side by side where they are and where they go."""
    first, count = (-1, -1), 0
    for old, new in sorted(moves.items()):
        if count and (old, new) == (first[0] + count, first[1] + count):
            count += 1
            continue
        if count:
            yield *first, count
        first, count = (old, new), 1
    if count:
        yield *first, count
