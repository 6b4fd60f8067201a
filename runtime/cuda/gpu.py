"""What the step runner asks of a GPU: events, pinned memory, capture.

Its only calls of torch.cuda: all else of it is tested on the CPU with a stand-in for this.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor

Run = Callable[[], object]
Replay = Callable[[], None]


class Mark(Protocol):
    """A place in what the device was asked to do."""

    def synchronize(self) -> None:
        """Waits until the device has come so far."""


class Gpu(Protocol):
    device: torch.device

    def pinned(self, count: int) -> Tensor:
        """int32 [count] on the host, at an address that the device can read."""

    def mark(self) -> Mark:
        """After all that was asked of the compute stream until now."""

    def rehearse(self, run: Run) -> None:
        """Runs what is about to be captured, so that it is compiled and has its workspaces."""

    def capture(self, run: Run) -> Replay:
        """Notes what `run` launches without running it; the result launches it all at once.

        `run` must not wait for the device, and what it leaves for others lies in tensors that were
        there before, or that somebody holds on to.
        """

    def free_bytes(self) -> int:
        """Device memory that nobody uses, torch's own reserves aside."""

    def is_lost(self) -> bool:
        """Whether the device computes nothing any more; waits for what it is at."""


# Graphs whose capture failed at any point: torch's allocators keep a pointer to one that has not
# ended well and ask it, at each allocation, whether the stream is capturing. Until torch 2.12 they
# also take it for under way for ever, and torch.cuda.empty_cache() raises.
_broken: list[torch.cuda.CUDAGraph] = []


class CudaGpu:
    """The current device. Its compute stream is torch's current one where this is called."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        # One stream and one pool for all graphs: what one of them needs only while it runs, the
        # next may use, as they run one after another. cuBLAS keeps a workspace per stream.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32).pin_memory()

    def mark(self) -> Mark:
        event: torch.cuda.Event = torch.cuda.current_stream().record_event()
        return event

    def rehearse(self, run: Run) -> None:
        compute = torch.cuda.current_stream()
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            run()
        compute.wait_stream(self._stream)

    def capture(self, run: Run) -> Replay:
        # Not `with torch.cuda.graph(...)`: that waits for the whole device, swaps included, and
        # gives torch's reserves back, which the next steps would have to ask for again.
        graph = torch.cuda.CUDAGraph()
        with _no_garbage_collection(), torch.cuda.stream(self._stream):
            try:
                # "thread_local": only this thread's calls are held to the rules of a capture.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                run()
                graph.capture_end()
            except BaseException:
                _broken.append(graph)
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
        return graph.replay

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def is_lost(self) -> bool:
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection might free another graph, or memory, which a capture does not allow."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
