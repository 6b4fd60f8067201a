"""What every section gets: the device, the sizes, a stopwatch, and a place for its figures."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from figures import Figures, Gate
from sizes import Sizes

Work = Callable[[], object]

__all__ = ["Bench", "Gate", "Work"]


@dataclass(frozen=True, slots=True)
class Bench:
    device: str  # "cuda", or "cpu" in a dry run
    sizes: Sizes
    figures: Figures
    ends_at: float  # on the monotonic clock

    @property
    def dry(self) -> bool:
        """Whether this only proves that the script runs: nothing that is timed means anything."""
        return self.device != "cuda"

    @property
    def left_s(self) -> float:
        return self.ends_at - time.monotonic()

    def seconds(self, works: Sequence[Work], budget_s: float = 0.06) -> float:
        """Of one work, as they run one after the other in one graph: the median of replays.

        Several works on inputs of their own keep the cache from holding what is to be read.
        """
        if self.dry:
            return _on_cpu(works)
        for _ in range(2):
            for work in works:
                work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for work in works:
                work()
        return self.replays(graph.replay, budget_s) / len(works)

    def replays(self, replay: Work, budget_s: float = 0.06) -> float:
        """Median seconds of what `replay` starts on the device, between two events."""
        if self.dry:
            return _on_cpu([replay])
        replay()
        first = max(between_events([replay])[0], 1e-6)
        count = max(5, min(200, round(budget_s / first)))
        return statistics.median(between_events([replay] * count))

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Normally distributed; never zeros, on which products run faster."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)


def between_events(works: Sequence[Work]) -> list[float]:
    """Seconds on the device of each, without waiting in between."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
    events[0].record()
    for work, event in zip(works, events[1:], strict=True):
        work()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 for a, b in zip(events, events[1:], strict=False)]


def _on_cpu(works: Sequence[Work]) -> float:
    started = time.perf_counter()
    for work in works:
        work()
    return (time.perf_counter() - started) / len(works)
