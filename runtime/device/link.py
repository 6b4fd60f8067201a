"""How a layer's bytes reach the device: in pieces, before or beside its steps. No torch here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

BYTES_PER_STEP = 8 * 2**20  # copied before one step, all swaps in flight together


class Bytes(Protocol):
    """A tensor of bytes, or what stands for one where nothing is computed."""

    def numel(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Self: ...

    def copy_(self, source: Self, /) -> Self: ...


class Event(Protocol):
    """A moment in a stream's work."""

    def query(self) -> bool:
        """Whether the stream has come past it; asks without waiting."""


@dataclass(slots=True)
class Transfer:
    """An image on its way."""

    pending: list[tuple[Bytes, Bytes]]  # (destination, source) of what is not yet under way
    started: Event | None = None  # when its destinations are no longer read or written
    arrived: Event | None = None  # when its last bytes are there; links with streams only

    def take_piece(self, most: int) -> tuple[Bytes, Bytes]:
        """The next bytes, so many at most; they are not pending any more."""
        destination, source = self.pending.pop(0)
        count = min(source.numel(), most)
        if count < source.numel():
            self.pending.insert(0, (destination[count:], source[count:]))
        return destination[:count], source[:count]


class Link(Protocol):
    """Carries images from the host into the device's memory, and moves bytes within it.

    Whatever it does comes after the steps that were launched before, as far as they are concerned,
    and before those that are launched after.
    """

    def begin(self, copies: Sequence[tuple[Bytes, Bytes]]) -> Transfer:
        """To carry these (destination, source). From now on no step uses the destinations."""

    def allowance(self) -> int:
        """Bytes that may be carried before the next step."""

    def carry(self, transfer: Transfer, allowance: int) -> int:
        """Goes on with it; what is left of the allowance."""

    def has_arrived(self, transfer: Transfer) -> bool:
        """Whether all bytes are there. Does not wait."""

    def land(self, transfer: Transfer, destination: Bytes, source: Bytes) -> None:
        """Copies within the device what has arrived. Later steps see the result."""

    def abandon(self, transfer: Transfer) -> None:
        """Later steps may use the destinations again."""

    def restore(self, destination: Bytes, source: Bytes) -> None:
        """Copies from the host at once, before any later step."""


Copy = Callable[[Bytes, Bytes], None]  # (destination, source), uint8 of equal length


def copy_bytes(destination: Bytes, source: Bytes) -> None:
    """One memcpy: torch would wake a second thread, which takes longer than a layer's bytes."""
    np.copyto(np.asarray(destination), np.asarray(source))


class PieceLink:
    """Copies with the thread that launches the steps, some bytes before each."""

    def __init__(
        self, copy: Copy = copy_bytes, allowance: Callable[[], int] = lambda: BYTES_PER_STEP
    ) -> None:
        self.copy = copy
        self._allowance = allowance

    def begin(self, copies: Sequence[tuple[Bytes, Bytes]]) -> Transfer:
        return Transfer(list(copies))

    def allowance(self) -> int:
        return self._allowance()

    def carry(self, transfer: Transfer, allowance: int) -> int:
        while transfer.pending and allowance > 0:
            destination, source = transfer.take_piece(allowance)
            self.copy(destination, source)
            allowance -= source.numel()
        return allowance

    def has_arrived(self, transfer: Transfer) -> bool:
        return not transfer.pending

    def land(self, transfer: Transfer, destination: Bytes, source: Bytes) -> None:
        self.copy(destination, source)

    def abandon(self, transfer: Transfer) -> None:
        transfer.pending.clear()

    def restore(self, destination: Bytes, source: Bytes) -> None:
        destination.copy_(source)
