"""Our way and torch's ways to one result, timed in turns."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from morphserve.morphcli.bench.kernels.result import KernelTime, Machine, Work

RACE_S = 0.5
LEAST_TURNS = 3  # beside the first
PATIENCE = 8  # times the seconds that are given, for the least turns
HEATS = 3  # calls by which the fastest of torch's routes is found

Call = Callable[[int], Tensor]  # the i-th call: it takes other weights than the latest ones


@dataclass(frozen=True, slots=True)
class Task:
    """What a kernel computes, our way and torch's ways."""

    kernel: str
    size: str
    rows: int
    work: Work | None  # None: what it reads is in the caches, as in a step
    ours: Call
    torch: Mapping[str, Call]  # none where this torch has no route
    refresh: Callable[[], object] = lambda: None  # before each call, not timed


def race(tasks: Sequence[Task], machine: Machine) -> list[KernelTime]:
    """Times of tasks that take turns with each other and with the fastest of torch's routes."""
    rivals = [_fastest(task) for task in tasks]
    calls = []
    for task, rival in zip(tasks, rivals, strict=True):
        calls.append((task.ours, task.refresh))
        if rival is not None:
            calls.append((task.torch[rival], task.refresh))
    times = iter(in_turns(calls, RACE_S))
    return [
        _told(task, machine, next(times), rival, None if rival is None else next(times))
        for task, rival in zip(tasks, rivals, strict=True)
    ]


def _told(
    task: Task, machine: Machine, ours: float, rival: str | None, theirs: float | None
) -> KernelTime:
    return KernelTime(
        kernel=task.kernel,
        size=task.size,
        rows=task.rows,
        work=task.work,
        seconds=ours,
        torch_route=rival,
        torch_seconds=theirs,
        of_limit=machine.least_seconds(task.work) / ours if task.work else None,
    )


def in_turns(
    calls: Sequence[tuple[Callable[[int], object], Callable[[], object]]], seconds: float
) -> list[float]:
    """Median seconds of each call, one of each after the other, for about so many seconds.

    The first turn, which finds nothing in place, counts only where calls are too long for more.
    """
    turns: list[list[float]] = []
    started = time.perf_counter()
    while _goes_on(len(turns), time.perf_counter() - started, seconds):
        turns.append([_timed(call, refresh, len(turns)) for call, refresh in calls])
    counted = turns[1:] if len(turns) > 2 else turns
    return [median(runs) for runs in zip(*counted, strict=True)]


def _goes_on(turns: int, spent_s: float, seconds: float) -> bool:
    wanted = spent_s < seconds or (turns <= LEAST_TURNS and spent_s < PATIENCE * seconds)
    return wanted or not turns


def _fastest(task: Task) -> str | None:
    """The name of torch's fastest route; None where it has none."""
    best = {
        route: min(_timed(call, task.refresh, i) for i in range(HEATS))
        for route, call in task.torch.items()
    }
    return min(best, key=best.__getitem__, default=None)


def _timed(call: Callable[[int], object], refresh: Callable[[], object], i: int) -> float:
    refresh()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    call(i)
    return clock() - started
