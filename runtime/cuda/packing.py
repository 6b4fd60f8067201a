"""One step's batch as one run of numbers, ready for the device to unpack."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from morphserve.runtime.request import PENDING, Request
from morphserve.runtime.scheduler import Batch, Slice

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Packed:
    """How much of what lies in a buffer, in the order that `unpack` names."""

    num_tokens: int
    num_seqs: int
    num_rows: int
    longest: int  # most tokens or blocks of one sequence


def room_for(max_tokens: int, max_seqs: int, max_blocks: int) -> int:
    """Numbers that a step of these sizes takes at most."""
    return max_tokens + max_seqs * (4 + max_blocks) + 2


class Packer:
    """Packs batches. Keeps the blocks of the latest one's requests as arrays."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._tables: dict[Request, _Table] = {}

    def pack(self, batch: Batch, rows: Mapping[Request, int], into: Ints) -> Packed:
        """Writes the batch to the start of `into`.

        rows: where a request's token that is not known yet will lie among those of the step before.
        """
        counts = [piece.end - piece.start for piece in batch]
        tables = self._blocks(batch)
        sizes = [len(table) for table in tables]
        starts = [0, *accumulate(counts)]
        asked = [starts[i + 1] - 1 for i, piece in enumerate(batch) if piece.samples]
        head = [*starts, *(piece.end for piece in batch), 0, *accumulate(sizes), *asked]
        head += _tokens(batch, rows)
        into[: len(head)] = head
        np.concatenate(tables, out=into[len(head) : len(head) + sum(sizes)])
        return Packed(starts[-1], len(batch), len(asked), max(*counts, *sizes))

    def _blocks(self, batch: Batch) -> list[Ints]:
        """The blocks of each slice, as far as the step reads them."""
        size, known = self._block_tokens, self._tables
        self._tables = {}
        arrays = []
        for piece in batch:
            request = piece.request
            table = known.get(request)
            if table is None or table.source is not request.blocks:
                table = _Table(request.blocks)
            elif len(table.array) != len(request.blocks):
                table.extend()
            self._tables[request] = table
            arrays.append(table.array[: -(-piece.end // size)])
        return arrays


class _Table:
    """A request's blocks as an array.

    Invariant of the scheduler: a list of blocks grows at its end or is replaced by another list.
    """

    __slots__ = ("array", "source")

    def __init__(self, source: list[int]) -> None:
        self.source = source
        self.array = np.array(source, dtype=np.int32)

    def extend(self) -> None:
        known, source = self.array, self.source
        assert len(known) < len(source)
        self.array = np.concatenate((known, np.array(source[len(known) :], dtype=np.int32)))


def _tokens(batch: Batch, rows: Mapping[Request, int]) -> list[int]:
    tokens: list[int] = []
    for piece in batch:
        request = piece.request
        if piece.end - piece.start == 1 and piece.samples and request.output:
            tokens.append(request.output[-1])  # as in most steps
        else:
            tokens += request.tokens(piece.start, piece.end)
        if tokens[-1] == PENDING:
            tokens[-1] = _late(piece, rows)
    return tokens


def _late(piece: Slice, rows: Mapping[Request, int]) -> int:
    """What stands for a token that the step before has chosen, but that nobody has read yet."""
    row = rows.get(piece.request)
    assert row is not None, f"{piece.request.id} waits for a token that no step is choosing"
    return -1 - row


def empty() -> Packed:
    """A step of padding alone, whatever the buffer holds."""
    return Packed(0, 0, 0, 0)
