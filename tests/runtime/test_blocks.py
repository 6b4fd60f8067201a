"""The block pool as a state machine: no block lost, none with two owners, content kept."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from morphserve.runtime.blocks import BASE, BlockPool
from morphserve.runtime.prefix_cache import next_name, root_name

REGIONS = {layer: tuple(range(100 * (layer + 1), 100 * (layer + 1) + 5)) for layer in range(4)}


class PoolMachine(RuleBasedStateMachine):
    """Requests take and give back blocks while regions come and go under them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(range(8))
        self.tables: dict[int, list[int]] = {}
        self.content: dict[int, tuple[int, int]] = {}  # block -> (request, index) written there
        self.open: set[int] = set()
        self.next_id = 0

    @rule(count=st.integers(1, 6))
    def admit(self, count: int) -> None:
        if count <= self.pool.num_free:
            self.tables[self.next_id] = self.pool.allocate(count)
            self._write(self.next_id)
            self.next_id += 1

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.tables)))
        self.pool.free(self.tables.pop(request))

    @rule(layer=st.sampled_from(sorted(REGIONS)))
    def grow(self, layer: int) -> None:
        if layer not in self.open:
            self.pool.publish(layer, REGIONS[layer])
            self.open.add(layer)

    @rule(layer=st.sampled_from(sorted(REGIONS)))
    def shrink(self, layer: int) -> None:
        if layer not in self.open:
            return
        before = self.pool.capacity, self.pool.num_free
        live = [b for table in self.tables.values() for b in table if b in REGIONS[layer]]
        elsewhere = self.pool.num_free - (len(REGIONS[layer]) - len(live))
        moves = self.pool.evacuate(layer)
        if moves is None:
            assert len(live) > elsewhere
            assert (self.pool.capacity, self.pool.num_free) == before
            return
        assert sorted(moves) == sorted(live)
        self.open.remove(layer)
        for old, new in moves.items():
            self.content[new] = self.content.pop(old)
        for request, table in self.tables.items():
            self.tables[request] = [moves.get(block, block) for block in table]

    @invariant()
    def pool_is_sound(self) -> None:
        self.pool.check(self.tables.values())
        assert self.pool.capacity == 8 + sum(len(REGIONS[layer]) for layer in self.open)

    @invariant()
    def every_table_still_points_at_its_own_content(self) -> None:
        for request, table in self.tables.items():
            assert [self.content[block] for block in table] == [
                (request, i) for i in range(len(table))
            ]

    def _write(self, request: int) -> None:
        for i, block in enumerate(self.tables[request]):
            self.content[block] = (request, i)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_base_fills_before_slabs_and_slabs_in_order_of_demotion() -> None:
    pool = BlockPool([0, 1])
    pool.publish(7, [70])
    pool.publish(3, [30])
    assert pool.allocate(4) == [0, 1, 70, 30]
    assert BASE == -1


def names(count: int, salt: str = "") -> list[bytes]:
    chain = [root_name(salt)]
    for i in range(count):
        chain.append(next_name(chain[-1], [i, i + 1]))
    return chain[1:]


def keep(pool: BlockPool, chain: list[bytes], rung: int = 0) -> list[int]:
    """A request's blocks, computed at this rung; it still holds them."""
    blocks = pool.allocate(len(chain))
    for block, name in zip(blocks, chain, strict=True):
        pool.register(block, name, rung)
    return blocks


def test_a_name_stands_for_all_tokens_up_to_the_blocks_end_and_for_the_salt() -> None:
    first, second = names(2)
    assert next_name(root_name(""), [0, 1]) == first
    assert next_name(first, [1, 2]) == second
    assert next_name(root_name(""), [1, 2]) != second
    assert len({*names(3), *names(3, "theirs")}) == 6


def test_idle_blocks_count_as_free_and_are_found_until_they_are_given_away() -> None:
    pool, chain = BlockPool(range(4)), names(3)
    blocks = keep(pool, chain)
    pool.free(blocks)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 3, 4)
    assert pool.find(chain, 0).blocks == blocks
    assert pool.allocate(1) == [3], "an empty block goes before idle ones"
    assert pool.allocate(1) == [blocks[2]], "of a chain the last block goes first"
    assert pool.find(chain, 0).blocks == blocks[:2]
    pool.check([[3], [blocks[2]]])


def test_the_block_that_was_idle_longest_goes_first() -> None:
    pool = BlockPool(range(2))
    a, b = names(1), names(1, "theirs")
    block_a, block_b = keep(pool, a), keep(pool, b)
    pool.free(block_b)
    pool.free(block_a)
    pool.share(block_b)
    pool.free(block_b)
    assert pool.allocate(1) == block_a


def test_a_shared_block_is_used_once_and_free_when_its_last_holder_is_gone() -> None:
    pool, chain = BlockPool(range(4)), names(2)
    blocks = keep(pool, chain)
    pool.share(pool.find(chain, 0).blocks)
    assert (pool.num_used, pool.num_shared, pool.num_free) == (2, 2, 2)
    assert not any(map(pool.is_writable, blocks))
    pool.free(blocks)
    assert (pool.num_used, pool.num_cached) == (2, 0)
    pool.free(blocks)
    assert (pool.num_used, pool.num_cached) == (0, 2)


def test_only_blocks_that_are_precise_enough_are_found_the_most_precise_first() -> None:
    pool, chain = BlockPool(range(8)), names(2)
    rough = keep(pool, chain, rung=3)
    assert pool.find(chain, 2) == ([], 0)
    assert pool.find(chain, 3) == (rough, 3)
    fine = keep(pool, chain[:1], rung=1)
    assert pool.find(chain, 3) == ([fine[0], rough[1]], 3)
    assert pool.find(chain, 2) == (fine, 1)


def test_a_block_is_not_kept_beside_one_as_precise() -> None:
    pool, chain = BlockPool(range(4)), names(1)
    first = keep(pool, chain, rung=1)
    second = keep(pool, chain, rung=1)
    third = keep(pool, chain, rung=2)
    pool.free(second)
    pool.free(third)
    assert pool.num_cached == 0
    assert pool.find(chain, 2).blocks == first


def test_evacuation_drops_idle_blocks_and_moves_a_shared_one_once() -> None:
    pool, shared, idle = BlockPool(range(3)), names(1), names(1, "theirs")
    filler = pool.allocate(3)
    pool.publish("slab", [70, 71])
    (block,) = keep(pool, shared)
    pool.share([block])
    pool.free(keep(pool, idle))
    assert pool.evacuate("slab") is None, "three blocks are held elsewhere"
    pool.free(filler)
    moves = pool.evacuate("slab")
    assert moves is not None and list(moves) == [70]
    moved = moves[70]
    assert pool.find(shared, 0).blocks == [moved]
    assert pool.find(idle, 0).blocks == []
    assert (pool.capacity, pool.num_used, pool.num_shared, pool.num_cached) == (3, 1, 1, 0)
    pool.check([[moved], [moved]])


def test_what_is_forgotten_is_found_no_more_and_empty_when_it_is_free() -> None:
    pool, chain = BlockPool(range(2)), names(2)
    blocks = keep(pool, chain)
    pool.forget(blocks)
    assert pool.find(chain, 0).blocks == []
    pool.free(blocks)
    assert (pool.num_cached, pool.num_free) == (0, 2)
