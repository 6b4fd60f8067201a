"""What the charts of the live view remember."""

from collections import deque
from dataclasses import dataclass

from morphserve.runtime.server.state import State

POINT_S = 0.5  # between two points
KEPT_S = 300.0


@dataclass(frozen=True, slots=True)
class Point:
    """One column of the charts."""

    time: float
    used: int  # KV blocks
    capacity: int
    prompt: float  # tokens per second
    generation: float


class History:
    """Points of one server, oldest first."""

    def __init__(self) -> None:
        self.points: deque[Point] = deque(maxlen=int(KEPT_S / POINT_S))

    def add(self, state: State) -> None:
        if self.points and state.time - self.points[-1].time < POINT_S:
            return
        rates = state.tokens_per_s
        self.points.append(
            Point(
                state.time,
                state.blocks_used,
                state.blocks_capacity,
                rates.prompt,
                rates.generation,
            )
        )

    def last(self, count: int) -> list[Point]:
        return list(self.points)[-count:] if count > 0 else []
