"""Outputs of kernels between guards: an item not written shows, and so does one written beside."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

_MARGIN = 256  # items before and after, of any size a multiple of the widest load


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Inside, `torch.empty` gives floats that are not numbers, between more of them.

    After it, those around them must still be so.
    """
    buffers: list[Tensor] = []

    def guarded(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        shape = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
        items = torch.Size(shape).numel()
        buffer = torch.full((items + 2 * _MARGIN,), torch.nan, dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[_MARGIN : _MARGIN + items].view(*shape)

    with patch.object(torch, "empty", guarded):
        yield
    for buffer in buffers:
        assert buffer[:_MARGIN].isnan().all()
        assert buffer[len(buffer) - _MARGIN :].isnan().all()
