"""Which KV blocks are free and which are used, over a capacity that grows and shrinks.

A block is named by its page in layer 0. Blocks belong to regions: the base, and those in the slabs
of layers at a lower precision. Regions are filled in the order in which they were published: the
base first, then slabs in the order of demotion, which is the reverse of the order of promotion; so
the slab that is wanted back first is the emptiest.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from morphserve.runtime.prefix_cache import Found, PrefixCache

Region = Hashable
BASE: Region = -1  # region of the blocks that are never taken back


class BlockPool:
    """Owns the blocks.

    Invariant: a block is used, by as many requests as hold it, or idle, or empty; never two of
    these. Idle blocks are kept by the prefix cache, and are given away when no empty one is left.
    """

    def __init__(self, base: Sequence[int]) -> None:
        self._region: dict[int, Region] = {}  # block -> region
        self._empty: dict[Region, list[int]] = {}  # region -> empty blocks, the next one last
        self._members: dict[Region, frozenset[int]] = {}  # region -> all its blocks
        self._holders: dict[int, int] = {}  # used block -> number of requests that hold it
        self._cache = PrefixCache()
        self._num_held = 0  # blocks in all requests' tables together
        self.publish(BASE, base)

    @property
    def capacity(self) -> int:
        return len(self._region)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: empty or idle."""
        return self.capacity - self.num_used

    @property
    def num_used(self) -> int:
        """Blocks held by requests, each once."""
        return len(self._holders)

    @property
    def num_shared(self) -> int:
        """Blocks that sharing saves: entries in the requests' tables beyond the blocks used."""
        return self._num_held - self.num_used

    @property
    def num_cached(self) -> int:
        """Idle blocks."""
        return self._cache.num_idle

    def publish(self, region: Region, blocks: Sequence[int]) -> None:
        """Adds a region's blocks, all empty, to the capacity."""
        assert region not in self._empty and not self._region.keys() & set(blocks)
        self._empty[region] = sorted(blocks, reverse=True)  # popped from the end: lowest first
        self._members[region] = frozenset(blocks)
        self._region.update(dict.fromkeys(blocks, region))

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks for one request; the caller has checked `num_free`."""
        assert 0 <= count <= self.num_free
        taken: list[int] = []
        for empty in self._empty.values():
            while empty and len(taken) < count:
                taken.append(empty.pop())
        while len(taken) < count:
            taken.append(self._cache.evict())
        self._holders.update(dict.fromkeys(taken, 1))
        self._num_held += count
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Takes blocks that were found for one more request."""
        for block in blocks:
            self._holders[block] = self._holders.get(block, 0) + 1
            self._cache.set_used(block)
        self._num_held += len(blocks)

    def free(self, blocks: Sequence[int]) -> None:
        """Gives one request's blocks back. Of a chain, the last becomes idle first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                if self._cache.has(block):
                    self._cache.set_idle(block)
                else:
                    self._empty[self._region[block]].append(block)
        self._num_held -= len(blocks)

    def find(self, names: Sequence[bytes], deepest: int) -> Found:
        """The longest beginning that is cached with blocks of rung `deepest` or shallower."""
        return self._cache.find(names, deepest)

    def register(self, block: int, name: bytes, rung: int) -> None:
        """Keeps a used block, whose tokens are all computed, to be found by its name."""
        assert block in self._holders
        self._cache.add(block, name, rung)

    def forget(self, blocks: Iterable[int]) -> None:
        """Lets nobody find these used blocks any more."""
        for block in blocks:
            assert block in self._holders
            self._cache.forget(block)

    def is_used(self, block: int) -> bool:
        return block in self._holders

    def are_writable(self, blocks: Iterable[int]) -> bool:
        """Whether one request holds each of them and nobody else can find it."""
        for block in blocks:
            if self._holders[block] > 1 or self._cache.has(block):
                return False
        return True

    def evacuate(self, region: Region) -> dict[int, int] | None:
        """Takes a region out of the capacity and says where its used blocks go: old -> new.

        None, and nothing changes, if the other regions have too few free blocks. Idle blocks of the
        region are dropped. The caller must copy the blocks' content and rewrite the tables before
        anything writes to the region.
        """
        members = self._members[region]
        live = sorted(members & self._holders.keys())
        if len(live) > self.num_free - (len(members) - len(live)):
            return None
        for block in members - set(live):
            self._cache.forget(block)
        holders = [self._holders.pop(block) for block in live]
        del self._empty[region], self._members[region]
        for block in members:
            del self._region[block]
        moves = dict(zip(live, self.allocate(len(live)), strict=True))
        self._num_held -= len(live)  # `allocate` counted them once more
        for count, (old, new) in zip(holders, moves.items(), strict=True):
            self._holders[new] = count
            self._cache.move(old, new)
        return moves

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts the invariants against the block tables of all requests."""
        tables = list(tables)
        assert all(len(table) == len(set(table)) for table in tables), "a block is twice in a table"
        holders = Counter(block for table in tables for block in table)
        assert holders == self._holders, "a block has other holders than the tables say"
        assert holders.total() == self._num_held
        used, idle = set(holders), self._cache.check()
        empty = [block for blocks in self._empty.values() for block in blocks]
        assert len(empty) == len(set(empty)), "a block is empty twice"
        assert len(used) + len(idle) + len(empty) == self.capacity, "a block is two things"
        assert used | idle | set(empty) == self._region.keys(), "a block is lost"
