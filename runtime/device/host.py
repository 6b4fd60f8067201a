"""This machine's processor and main memory."""

import mmap
import os
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.configs.schema import CPU_DEFAULTS, CacheConfig, SchedulerConfig
from morphserve.quantize.machine import device_name, free_memory
from morphserve.runtime import parts
from morphserve.runtime.device.link import PieceLink
from morphserve.runtime.layers import Layers
from morphserve.runtime.layout import DeviceMemory
from morphserve.runtime.model import Model
from morphserve.runtime.runner import Runner


class HostDevice:
    kind = "cpu"
    location = torch.device("cpu")
    defaults = CPU_DEFAULTS

    def __init__(self) -> None:
        self.name = device_name()

    @property
    def num_threads(self) -> int:
        return torch.get_num_threads()

    def memory(self, cache: CacheConfig, activation_bytes: int) -> DeviceMemory:
        """Activations come from what is left beside the arena: half of what is free, or more."""
        if cache.gpu_memory_utilization is not None:
            raise ConfigError(
                "--gpu-memory-utilization is a share of a GPU, and the CPU serves: set "
                "--memory-budget, or choose a GPU with --device cuda"
            )
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return DeviceMemory(total, lambda: free_memory() // 2)

    def allocate(self, num_bytes: int) -> Tensor:
        """Pages of their own, which take memory as they are written."""
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def measure(self, run: Callable[[], None]) -> int | None:
        return None

    def pin(self, images: Iterable[Tensor]) -> None:
        """They are copied from where they are."""

    def link(self) -> PieceLink:
        return PieceLink()

    def runner(self, model: Model, limits: SchedulerConfig, eos_token_ids: Sequence[int]) -> Runner:
        return Runner(model, eos_token_ids)

    def warm_up(self, runner: parts.Runner, layers: Layers) -> None:
        """Its kernels are compiled as they are loaded."""
