"""Copies beyond what processor caches hold, in huge pages as the arena is."""

import mmap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morphserve.runtime.kernels import Linear
from morphserve.runtime.memory import align


def beyond_caches() -> int:
    """Bytes of which the last cache holds no more than half."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kib = [int(path.read_text().strip().removesuffix("K")) for path in sizes]
    return max(64 * 2**20, 2 * 1024 * max(kib, default=0))


def huge_buffer(num_bytes: int) -> Tensor:
    """So many bytes, uint8, of memory that is asked for in huge pages."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def copies(tensor: Tensor, count: int) -> list[Tensor]:
    stride = align(tensor.nbytes)
    parts = huge_buffer(count * stride).view(count, stride)[:, : tensor.nbytes]
    return [part.view(tensor.dtype).view(tensor.shape).copy_(tensor) for part in parts]


def copies_beyond_caches(tensor: Tensor) -> list[Tensor]:
    """As many copies as go beyond the caches."""
    return copies(tensor, 1 + beyond_caches() // tensor.nbytes)


def linears_beyond_caches(linear: Linear) -> list[Linear]:
    """The same of a linear: of every tensor in it."""
    count = 1 + beyond_caches() // linear_bytes(linear)
    columns = {name: copies(tensor, count) for name, tensor in _tensors(linear).items()}
    rows: list[dict[str, Any]] = [
        {name: column[i] for name, column in columns.items()} for i in range(count)
    ]
    return [replace(linear, **row) for row in rows]


def linear_bytes(linear: Linear) -> int:
    """Of everything that it reads for each batch."""
    return sum(tensor.nbytes for tensor in _tensors(linear).values())


def _tensors(linear: Linear) -> dict[str, Tensor]:
    parts = {field.name: getattr(linear, field.name) for field in fields(linear)}
    return {name: part for name, part in parts.items() if isinstance(part, Tensor)}
