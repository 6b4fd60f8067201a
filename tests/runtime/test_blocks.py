"""The block pool as a state machine: no block lost, none with two owners, content kept."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from morphserve.runtime.blocks import BASE, BlockPool

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
