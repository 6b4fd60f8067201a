"""One GPU, by way of torch.cuda."""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from morphserve.configs.errors import OutOfBudget
from morphserve.configs.schema import CUDA_DEFAULTS, CacheConfig, SchedulerConfig
from morphserve.quantize.machine import device_name
from morphserve.runtime.cuda.gpu import CudaGpu
from morphserve.runtime.cuda.inputs import Limits
from morphserve.runtime.cuda.runner import CudaRunner, Sampler
from morphserve.runtime.cuda.sampler import DeviceSampler
from morphserve.runtime.cuda.step import StepKernels
from morphserve.runtime.device.link import Bytes, Event
from morphserve.runtime.device.pinning import Cudart, pin
from morphserve.runtime.device.streams import StreamLink
from morphserve.runtime.device.uploading import Uploading
from morphserve.runtime.layers import Layers
from morphserve.runtime.layout import DeviceMemory
from morphserve.runtime.model import Model
from morphserve.runtime.parts import Runner
from morphserve.runtime.runner import Runner as PlainRunner

UTILIZATION = 0.9  # of the device's memory, for everything, unless settings say otherwise
# Of graphs, which are captured when the arena is there. Estimates: a kernel in a graph takes some
# 25 KB of the driver's memory (what vLLM logs of its graphs comes to 20 to 100). For an 8B model
# with 256 requests that is 8 MiB for each of up to 67 whole steps and 0.25 MiB for each of 860
# layers in two variants. The stream of captures keeps memory of its own: 100 MiB to rehearse in,
# 100 that graphs work in, and cuBLAS's 32. The log tells at each start what it was.
GRAPH_BYTES = 2**30

logger = logging.getLogger(__name__)


class CudaDevice:
    """Belongs to the thread that makes it: torch's current device is one of the thread's own."""

    kind = "cuda"
    defaults = CUDA_DEFAULTS
    num_threads = 0

    def __init__(self, index: int) -> None:
        torch.cuda.set_device(index)
        self.location = torch.device("cuda", index)
        self.name = device_name(str(self.location))
        self._is_pinned = False
        self._allocated = 0  # bytes, by `allocate`

    def memory(self, cache: CacheConfig, activation_bytes: int) -> DeviceMemory:
        """What is in use now stays so: by others, by libraries, by the driver for this process.

        An explicit budget may take all that is left, the default one its share.
        """
        free, total = torch.cuda.mem_get_info(self.location)
        share, whose = 1.0, "left"
        if cache.memory_budget is None:
            share = cache.gpu_memory_utilization or UTILIZATION
            whose = f"left at --gpu-memory-utilization {share:g}"
        most = max(0, int(share * total) - (total - free) - activation_bytes)
        return DeviceMemory(most, lambda: most, f"{self.name} has {whose}", fills=True)

    def allocate(self, num_bytes: int) -> Tensor:
        try:
            found = torch.empty(num_bytes, dtype=torch.uint8, device=self.location)
        except torch.OutOfMemoryError as error:
            wanted, free = num_bytes / 2**20, torch.cuda.mem_get_info(self.location)[0] / 2**20
            raise OutOfBudget(
                f"{self.name} has {free:.0f} MiB free and cannot give {wanted:.0f} MiB for weights "
                "and KV cache: stop what else uses it, or lower "
                "--gpu-memory-utilization or --memory-budget"
            ) from error
        self._allocated += num_bytes
        return found

    def measure(self, run: Callable[[], None]) -> int | None:
        """At its highest; without what `allocate` gave, and with what graphs will take.

        Raises OutOfBudget if it does not get it.
        """
        self._give_back()
        before, allocated = torch.cuda.memory_reserved(), self._allocated
        torch.cuda.reset_peak_memory_stats()
        with self._told("lower --max-num-batched-tokens or --max-num-seqs"):
            run()
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved() - (self._allocated - allocated)
        self._give_back()
        # What is kept from now on, workspaces of cuBLAS, `memory` finds in use.
        return max(0, peak - max(before, torch.cuda.memory_reserved())) + GRAPH_BYTES

    @contextmanager
    def _told(self, advice: str) -> Iterator[None]:
        """Says what to do where a step finds no memory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfBudget(
                f"{self.name} has too little memory for the largest step: stop what else uses it, "
                f"or {advice} ({error})"
            ) from error

    def _give_back(self) -> None:
        """Memory that torch keeps and nobody uses."""
        gc.collect()
        torch.cuda.empty_cache()

    def pin(self, images: Iterable[Tensor]) -> None:
        cudart = cast(Cudart, torch.cuda.cudart())  # type: ignore[no-untyped-call]
        self._is_pinned = pin(images, cudart, self._forget_error)

    def _forget_error(self) -> None:
        """The next launch would raise the error of a call that was handled."""
        try:
            torch.zeros(1, device=self.location)
        except RuntimeError:
            logger.debug("error of a call that was handled", exc_info=True)

    def link(self) -> StreamLink:
        # Spacers of the side stream are tiny: with priority they need not wait for a gap between
        # the kernels of a step.
        side = torch.cuda.Stream(self.location, priority=-1)  # type: ignore[no-untyped-call]
        return StreamLink(
            CudaStream(self.location, None),
            CudaStream(self.location, side),
            is_pinned=self._is_pinned,
        )

    def runner(self, model: Model, limits: SchedulerConfig, eos_token_ids: Sequence[int]) -> Runner:
        """The reference's operations wait for the device, so no graph holds them."""
        if model.kernels.name == "reference":
            return PlainRunner(Uploading.of(model), eos_token_ids)
        most = Limits(
            max_tokens=limits.max_num_batched_tokens,
            max_seqs=limits.max_num_seqs,
            max_blocks=-(-len(model.cos_sin) // model.shape.block_tokens),
        )
        kernels = cast(StepKernels, model.kernels)
        sampler = cast(Sampler, DeviceSampler(eos_token_ids))
        return CudaRunner(CudaGpu(), kernels, model, sampler, most)

    def warm_up(self, runner: Runner, layers: Layers) -> None:
        if isinstance(runner, CudaRunner):
            with self._told("lower --gpu-memory-utilization or --memory-budget"):
                runner.warm_up(layers.views, layers.stage)


class CudaStream:
    """A stream of torch's; None: whichever is the current one when it is given work."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device, self._own = device, stream
        self._spacer = torch.zeros(1, device=device)
        self.pause()  # loads its code while nobody waits

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own or torch.cuda.current_stream(self._device)

    def copy(self, destination: Bytes, source: Bytes) -> None:
        with torch.cuda.stream(self._own):
            cast(Tensor, destination).copy_(cast(Tensor, source), non_blocking=True)

    def pause(self) -> None:
        """A kernel: a copy of one byte, or a fill, might be given to the engine that copies."""
        with torch.cuda.stream(self._own):
            self._spacer.add_(1)

    def record(self) -> Event:
        return cast(Event, self._stream.record_event())

    def wait(self, event: Event) -> None:
        self._stream.wait_event(cast(torch.cuda.Event, event))
