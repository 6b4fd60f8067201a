"""Which KV blocks are free and which are used, over a capacity that grows and shrinks.

A block is named by its page in layer 0. Blocks belong to regions: the base, and one per slab whose
layer is INT4. Regions are filled in the order in which they were published: the base first, then
slabs in the order of demotion, which is the reverse of the order of promotion; so the slab that is
wanted back first is the emptiest.
"""

from collections.abc import Hashable, Iterable, Sequence

BASE = -1  # region of the blocks that are never taken back


class BlockPool:
    """Owns the blocks. Invariant: a block is free or used, never both; free + used = capacity."""

    def __init__(self, base: Sequence[int]) -> None:
        self._region: dict[int, Hashable] = {}  # block -> region
        self._free: dict[Hashable, list[int]] = {}  # region -> free blocks, the next one last
        self._members: dict[Hashable, frozenset[int]] = {}  # region -> all its blocks
        self._used: set[int] = set()
        self.publish(BASE, base)

    @property
    def capacity(self) -> int:
        return len(self._region)

    @property
    def num_free(self) -> int:
        return self.capacity - self.num_used

    @property
    def num_used(self) -> int:
        return len(self._used)

    def publish(self, region: Hashable, blocks: Sequence[int]) -> None:
        """Adds a region's blocks, all free, to the capacity."""
        assert region not in self._free and not self._region.keys() & set(blocks)
        self._free[region] = sorted(blocks, reverse=True)  # popped from the end: lowest first
        self._members[region] = frozenset(blocks)
        self._region.update(dict.fromkeys(blocks, region))

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; the caller has checked `num_free`."""
        assert count <= self.num_free
        taken: list[int] = []
        for free in self._free.values():
            while free and len(taken) < count:
                taken.append(free.pop())
        self._used.update(taken)
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._used.remove(block)
            self._free[self._region[block]].append(block)

    def evacuate(self, region: Hashable) -> dict[int, int] | None:
        """Takes a region out of the capacity and says where its live blocks go: old -> new.

        None, and nothing changes, if the other regions have too few free blocks. The caller must
        copy the blocks' content and rewrite the tables before anything writes to the region.
        """
        members, num_free = self._members[region], len(self._free[region])
        if len(members) - num_free > self.num_free - num_free:
            return None
        live = sorted(members & self._used)
        del self._free[region], self._members[region]
        self._used -= members
        for block in members:
            del self._region[block]
        return dict(zip(live, self.allocate(len(live)), strict=True))

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts the invariants against the block tables of all requests."""
        used = [block for table in tables for block in table]
        free = [block for blocks in self._free.values() for block in blocks]
        assert len(used) == len(set(used)), "a block has two owners"
        assert set(used) == self._used, (
            "a table holds a block that is not used, or a used block is lost"
        )
        assert len(free) == len(set(free)), "a block is free twice"
        assert not set(used) & set(free), "a used block is free"
        assert set(used) | set(free) == self._region.keys(), "a block is lost"
