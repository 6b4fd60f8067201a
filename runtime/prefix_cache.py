"""Full blocks of KV, kept under the names of their tokens for requests with the same beginning.

A block's name is a digest over its tokens and the name of the block before it, so it stands for all
tokens up to its end. The first link is the request's salt. Beside the name stands the rung: the
deepest one under which anything of that beginning was computed. KV from a burst is thus not taken
for KV of full precision afterwards.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

_DIGEST_BYTES = 16


def root_name(salt: str) -> bytes:
    """What the first block of every request with this salt follows."""
    return hashlib.blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()


def next_name(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The name of the block that holds these tokens behind the block `previous`."""
    content = previous + array("I", tokens).tobytes()
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


class Found(NamedTuple):
    """The longest beginning of a request that is there."""

    blocks: list[int]
    rung: int  # the deepest of theirs


class PrefixCache:
    """Which block holds which beginning, and which of them are idle: held by no request.

    Invariant: a name and a rung stand for one block, and that block for no other.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, dict[int, int]] = {}  # name -> rung -> block
        self._names: dict[int, tuple[bytes, int]] = {}  # block -> name, rung
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest idle first

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, names: Sequence[bytes], deepest: int) -> Found:
        """Follows the names while there are blocks of rung `deepest` or shallower."""
        blocks, rung = [], 0
        for name in names:
            by_rung = self._blocks.get(name)
            if by_rung is None or (shallowest := min(by_rung)) > deepest:
                break
            blocks.append(by_rung[shallowest])
            rung = max(rung, shallowest)
        return Found(blocks, rung)

    def add(self, block: int, name: bytes, rung: int) -> None:
        """Keeps a block whose tokens are computed, unless one at least as precise is there."""
        assert block not in self._names
        by_rung = self._blocks.setdefault(name, {})
        if not by_rung or min(by_rung) > rung:
            by_rung[rung] = block
            self._names[block] = (name, rung)

    def forget(self, block: int) -> None:
        """Drops the block's name, if it has one."""
        if named := self._names.pop(block, None):
            name, rung = named
            del self._blocks[name][rung]
            if not self._blocks[name]:
                del self._blocks[name]
        self._idle.pop(block, None)

    def has(self, block: int) -> bool:
        return block in self._names

    def set_idle(self, block: int) -> None:
        """Notes that no request holds a named block any more."""
        assert block in self._names
        self._idle[block] = None

    def set_used(self, block: int) -> None:
        self._idle.pop(block, None)

    def evict(self) -> int:
        """Drops the block that has been idle longest."""
        block = next(iter(self._idle))
        self.forget(block)
        return block

    def move(self, old: int, new: int) -> None:
        """Notes that the content of `old` lies in `new` now."""
        if named := self._names.pop(old, None):
            name, rung = named
            self._names[new] = named
            self._blocks[name][rung] = new

    def check(self) -> set[int]:
        """Asserts the invariant and returns the idle blocks."""
        listed = {
            block: (name, rung)
            for name, by_rung in self._blocks.items()
            for rung, block in by_rung.items()
        }
        assert listed == self._names, "a name stands for a block that has another"
        assert all(self._blocks.values()), "a name stands for no block"
        idle = set(self._idle)
        assert idle <= self._names.keys(), "an idle block has no name"
        return idle
