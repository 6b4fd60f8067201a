"""How long work takes on the device that does it."""

import gc
import time
from collections.abc import Callable, Sequence

import torch

Work = Callable[[], object]
Preparation = Callable[[], Work]  # what is timed comes out of it; what it does itself is not timed
Watch = Callable[[], list[float]]

_REHEARSALS = 2  # compile kernels, and let cuBLAS have its workspaces
_HEAD_START_CYCLES = 6_000_000  # of the GPU's clock, about 3 ms: the host launches a step in less


def stopwatch(device: torch.device, preparations: Sequence[Preparation]) -> Watch:
    """Each call does all works, one after another, and returns the seconds of each.

    On a GPU they are captured once, in one graph with a time stamp after each: no launch is waited
    for, and what they work on is prepared once. They may not wait for the device, then.
    """
    if device.type != "cuda":
        return lambda: [_host_seconds(prepare()) for prepare in preparations]
    works = [prepare() for prepare in preparations]
    compute = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(compute)
    stamps = [_stamp(external=True) for _ in range(len(works) + 1)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(_REHEARSALS):
            for work in works:
                work()
        side.synchronize()
        gc.collect()
        with torch.cuda.graph(graph, stream=side):
            stamps[0].record()
            for work, stamp in zip(works, stamps[1:], strict=True):
                work()
                stamp.record()

    def watch(_in_use: Sequence[Work] = works) -> list[float]:
        graph.replay()
        torch.cuda.synchronize(device)
        return [float(a.elapsed_time(b)) / 1e3 for a, b in zip(stamps, stamps[1:], strict=False)]

    return watch


def seconds_alone(device: torch.device, launch: Callable[[], Work]) -> float:
    """What takes the device from the launch to when the work that it returns has waited for it.

    For what cannot be captured. On a GPU the host's part is not counted: the GPU is kept busy until
    all has been launched.
    """
    if device.type != "cuda":
        return _host_seconds(lambda: launch()())
    begins, ends = _stamp(), _stamp()
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
    begins.record()
    wait = launch()
    ends.record()
    wait()
    torch.cuda.synchronize(device)
    return float(begins.elapsed_time(ends)) / 1e3


def _stamp(external: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]


def _host_seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
