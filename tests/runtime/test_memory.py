"""The memory plan: pages have one use, and the promised capacities are there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.configs.errors import OutOfBudget
from morphserve.runtime.memory import (
    MemoryPlan,
    ModelSizes,
    align,
    budget_for,
    choose_run,
    plan_memory,
)

KIB = 1024


def demo_sizes() -> ModelSizes:
    """The demo model in bfloat16."""
    return ModelSizes(
        static_bytes=2_100_224,
        full_bytes=(1_573_888,) * 12,
        int4_bytes=(418_816,) * 12,
        kv_bytes_per_token=512,
        block_tokens=16,
    )


@st.composite
def any_sizes(draw: st.DrawFn) -> ModelSizes:
    num_layers = draw(st.integers(1, 8))
    full = [align(draw(st.integers(4 * KIB, 400 * KIB))) for _ in range(num_layers)]
    return ModelSizes(
        static_bytes=align(draw(st.integers(0, 100 * KIB))),
        full_bytes=tuple(full),
        int4_bytes=tuple(align(nbytes // draw(st.integers(3, 4))) for nbytes in full),
        kv_bytes_per_token=draw(st.sampled_from([32, 64, 256])),
        block_tokens=draw(st.sampled_from([8, 16])),
    )


def pages_of(plan: MemoryPlan, blocks: tuple[int, ...]) -> list[int]:
    layers = range(plan.sizes.num_layers)
    return [block + layer * plan.run_blocks for block in blocks for layer in layers]


@given(any_sizes(), st.integers(0, 300 * KIB))
def test_every_page_has_one_use(sizes: ModelSizes, spare: int) -> None:
    budget = budget_for(sizes, 2, 4 * KIB, num_tokens=64) + spare
    plan = plan_memory(sizes, budget, 2, 4 * KIB)
    page = sizes.page_bytes
    used = list(range(align(sizes.static_bytes, page) // page))
    for offset in plan.staging:
        used += range(offset // page, (offset + align(max(sizes.int4_bytes), page)) // page)
    used += pages_of(plan, plan.base_blocks)
    for slab in plan.slabs:
        used += range(slab.page, slab.page + slab.num_pages)
    assert len(used) == len(set(used))
    assert max(used) < plan.num_pages
    assert plan.num_bytes <= budget


@given(any_sizes())
def test_freed_blocks_end_before_the_int4_image(sizes: ModelSizes) -> None:
    plan = plan_memory(sizes, budget_for(sizes, 1, 4 * KIB, 64), 1, 4 * KIB)
    for layer, slab in enumerate(plan.slabs):
        end = (slab.page + slab.num_pages) * sizes.page_bytes
        assert slab.int4_offset + sizes.int4_bytes[layer] == end
        assert slab.full_offset + sizes.full_bytes[layer] <= end
        for page in pages_of(plan, slab.blocks):
            assert slab.page <= page
            assert (page + 1) * sizes.page_bytes <= slab.int4_offset


def test_capacity_grows_by_what_each_layer_of_the_order_frees() -> None:
    plan = plan_memory(demo_sizes(), 64 * 2**20, 2, 64 * KIB)
    base = len(plan.base_blocks)
    assert plan.capacities([3, 0, 7], 2) == (base, base + 11, base + 22)


def test_the_run_is_long_where_that_wastes_little() -> None:
    sizes = demo_sizes()
    assert choose_run(sizes, 64 * KIB) * sizes.page_bytes >= 64 * KIB


def test_a_budget_computed_for_some_tokens_holds_them() -> None:
    sizes = demo_sizes()
    plan = plan_memory(sizes, budget_for(sizes, 2, 64 * KIB, 2048), 2, 64 * KIB)
    assert len(plan.base_blocks) * sizes.block_tokens >= 2048


def test_a_budget_below_the_model_is_refused_with_the_number_that_fits() -> None:
    with pytest.raises(OutOfBudget, match=r"raise --memory-budget to \d+\.\d MiB"):
        plan_memory(demo_sizes(), 2**20, 2, 64 * KIB)
