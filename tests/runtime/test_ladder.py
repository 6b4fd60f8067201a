"""The ladder: what each rung means, and which swap leads from one to another."""

from hypothesis import given
from hypothesis import strategies as st

from morphserve.quantize.manifest import Rung, Variant
from morphserve.runtime.ladder import Ladder, steps_of

FULL, INT8, INT4 = Variant.FULL, Variant.INT8, Variant.INT4
LADDER = Ladder((Rung(2, INT8), Rung(0, INT8), Rung(2, INT4), Rung(1, INT8), Rung(0, INT4)), 3)


def test_each_rung_takes_one_step_more() -> None:
    assert LADDER.variants_at(0) == [FULL, FULL, FULL]
    assert LADDER.variants_at(3) == [INT8, FULL, INT4]
    assert LADDER.variants_at(5) == [INT4, INT8, INT4]
    assert [LADDER.rung_of(LADDER.variants_at(r)) for r in range(6)] == list(range(6))


def test_layers_between_two_rungs_count_as_the_deeper_one() -> None:
    assert LADDER.rung_of([FULL, FULL, INT4]) == 3


def test_a_floor_of_precision_is_a_deepest_rung() -> None:
    assert [LADDER.deepest(floor) for floor in (FULL, INT8, INT4)] == [0, 2, 5]


def test_a_layer_goes_down_at_once_and_back_step_by_step() -> None:
    assert LADDER.next_swap([FULL] * 3, (), 3) == Rung(2, INT4)
    assert LADDER.next_swap([FULL] * 3, {2}, 3) == Rung(0, INT8)
    assert LADDER.next_swap([INT4, INT8, INT4], (), 3) == Rung(0, INT8)
    assert LADDER.next_swap([INT8, FULL, INT4], (), 3) is None
    assert LADDER.next_swap([INT8, FULL, INT4], (), 0) == Rung(2, INT8)
    assert LADDER.next_swap([INT8, FULL, INT4], {2}, 0) == Rung(0, FULL)


@given(st.integers(0, 5), st.integers(0, 5))
def test_swaps_lead_from_any_rung_to_any_other(start: int, target: int) -> None:
    variants = LADDER.variants_at(start)
    swaps = 0
    while step := LADDER.next_swap(variants, (), target):
        variants[step.layer] = step.to
        swaps += 1
    assert variants == LADDER.variants_at(target)
    assert swaps <= 5


def test_the_deepest_rung_counts_int4_layers_alone() -> None:
    assert [LADDER.deepest_with(n) for n in (0, 1, 2, 3)] == [2, 4, 5, 5]


def test_every_layer_of_an_order_takes_one_variant_before_the_next() -> None:
    assert steps_of([1, 0], [INT8, INT4]) == (
        Rung(1, INT8), Rung(0, INT8), Rung(1, INT4), Rung(0, INT4),
    )  # fmt: skip
