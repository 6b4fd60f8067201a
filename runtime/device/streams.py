"""The link of a device that copies beside its steps: one compute stream, one side stream.

All that steps do is ordered on the compute stream, as are copies within the device. The side stream
carries images, and three waits tie the two together. The host never waits: it asks events whether
they have passed.
"""

from collections.abc import Sequence
from typing import Protocol

from morphserve.runtime.device.link import BYTES_PER_STEP, Bytes, Event, Transfer

# The engine that copies from the host serves streams in the order in which copies become ready, so
# a step's inputs wait for at most one piece of an image: 0.16 ms at 53 GB/s, 0.34 ms at 25.
PIECE_BYTES = 8 * 2**20
# Of pinned memory. A step's host time is thus at most that of 64 pieces, and the link, at some 50
# GB/s, has work for 10 ms: as long as a step.
PINNED_BYTES_PER_STEP = 512 * 2**20


class Stream(Protocol):
    """Work in the order in which it is given, done later; no call waits for the device."""

    def copy(self, destination: Bytes, source: Bytes) -> None: ...

    def pause(self) -> None:
        """Work next to nothing, after which copies of other streams have their turn first."""

    def record(self) -> Event:
        """The moment when all work given so far is done."""

    def wait(self, event: Event) -> None:
        """Work given from now on begins after the event."""


class StreamLink:
    """Carries images on `side`, in pieces, while steps run on `compute`.

    From pageable memory the driver copies with the calling thread: there, a piece goes before each
    step, as on a CPU, and only once the stream would not have to wait for anything.
    """

    def __init__(self, compute: Stream, side: Stream, *, is_pinned: bool) -> None:
        self._compute, self._side, self._is_pinned = compute, side, is_pinned

    def begin(self, copies: Sequence[tuple[Bytes, Bytes]]) -> Transfer:
        """Earlier steps may use the pages still, and an earlier commit the staging slot."""
        started = self._compute.record()
        self._side.wait(started)
        return Transfer(list(copies), started)

    def allowance(self) -> int:
        return PINNED_BYTES_PER_STEP if self._is_pinned else BYTES_PER_STEP

    def carry(self, transfer: Transfer, allowance: int) -> int:
        if not self._is_pinned and transfer.started and not transfer.started.query():
            return allowance
        while transfer.pending and allowance > 0:
            destination, source = transfer.take_piece(min(PIECE_BYTES, allowance))
            self._side.copy(destination, source)
            self._side.pause()
            allowance -= source.numel()
        if not transfer.pending and transfer.arrived is None:
            transfer.arrived = self._side.record()
        return allowance

    def has_arrived(self, transfer: Transfer) -> bool:
        return transfer.arrived is not None and transfer.arrived.query()

    def land(self, transfer: Transfer, destination: Bytes, source: Bytes) -> None:
        assert transfer.arrived is not None
        self._compute.wait(transfer.arrived)
        self._compute.copy(destination, source)

    def abandon(self, transfer: Transfer) -> None:
        """What is under way cannot be taken back: steps wait for it."""
        transfer.pending.clear()
        self._compute.wait(self._side.record())

    def restore(self, destination: Bytes, source: Bytes) -> None:
        self._compute.copy(destination, source)
