"""Requests that wait: in line for room, or held until layers are precise enough for them."""

from collections import deque
from collections.abc import Iterator

from morphserve.runtime.request import Request


class Queue:
    """First come, first served; who has run before goes first."""

    def __init__(self) -> None:
        self.line: deque[Request] = deque()
        self.held: list[Request] = []
        self._rung = 0

    def __iter__(self) -> Iterator[Request]:
        yield from self.line
        yield from self.held

    def add(self, request: Request) -> None:
        (self.line if request.runs_at(self._rung) else self.held).append(request)

    def put_back(self, request: Request) -> None:
        """Adds a request that was preempted."""
        if request.runs_at(self._rung):
            self.line.appendleft(request)
        else:
            self.held.insert(0, request)

    def remove(self, request: Request) -> None:
        (self.line if request.runs_at(self._rung) else self.held).remove(request)

    def set_rung(self, rung: int) -> None:
        """Holds those that may not run at this rung, and lets the others back into the line."""
        if rung == self._rung:
            return
        self._rung = rung
        waiting = sorted(self, key=lambda r: (not r.num_preemptions, r.arrival_s))
        self.line = deque(r for r in waiting if r.runs_at(rung))
        self.held = [r for r in waiting if not r.runs_at(rung)]

    def came_before(self, arrival_s: float) -> list[Request]:
        """Those that came before this time and have never run."""
        overdue: list[Request] = []
        for requests in (self.line, self.held):
            for request in requests:
                if request.num_preemptions:
                    continue  # at the front
                if request.arrival_s >= arrival_s:
                    break
                overdue.append(request)
        return overdue
