"""The block pool by counts: how many blocks are free, not which."""

from collections.abc import Iterable, Sequence

from morphserve.runtime.blocks import BASE, BlockPool, Region


class CountingPool(BlockPool):
    """Says yes and no where the block pool does; every block is called 0, and none is cached.

    Whether a region can be evacuated depends on counts alone. Which of its blocks are live does
    not show, so that evacuations move nothing.
    """

    def __init__(self, base: Sequence[int]) -> None:
        self._sizes: dict[Region, int] = {}
        self._capacity = self._used = 0
        self.publish(BASE, base)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def num_free(self) -> int:
        return self._capacity - self._used

    @property
    def num_used(self) -> int:
        return self._used

    @property
    def num_shared(self) -> int:
        return 0

    @property
    def num_cached(self) -> int:
        return 0

    def publish(self, region: Region, blocks: Sequence[int]) -> None:
        self._sizes[region] = len(blocks)
        self._capacity += len(blocks)

    def take(self, count: int) -> None:
        """As `allocate`, for whoever counts by himself."""
        self._used += count

    def allocate(self, count: int) -> list[int]:
        self._used += count
        return [0] * count

    def share(self, blocks: Sequence[int]) -> None:
        assert not blocks, "nothing is cached"

    def free(self, blocks: Sequence[int]) -> None:
        self._used -= len(blocks)

    def are_writable(self, blocks: Iterable[int]) -> bool:
        return True

    def evacuate(self, region: Region) -> dict[int, int] | None:
        if self._used > self._capacity - self._sizes[region]:
            return None
        self._capacity -= self._sizes.pop(region)
        return {}
