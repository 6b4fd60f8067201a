"""The one byte buffer that holds weights and KV cache, and typed views of it."""

import mmap
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from morphserve.runtime.memory import MemoryPlan


class Arena:
    """`plan.num_bytes` of memory that is allocated once and never grows."""

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self._memory = mmap.mmap(-1, plan.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._pages = self.bytes.view(plan.num_pages, plan.sizes.page_bytes)

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
        """Copies the content of blocks, all layers: old page0 -> new page0, no overlap."""
        if not moves:
            return
        steps = torch.arange(self.plan.sizes.num_layers) * self.plan.run_blocks
        old = (torch.tensor(list(moves.keys()))[:, None] + steps).flatten()
        new = (torch.tensor(list(moves.values()))[:, None] + steps).flatten()
        self._pages.index_copy_(0, new, self._pages.index_select(0, old))
