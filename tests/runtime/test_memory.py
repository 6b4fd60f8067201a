"""The memory plan: pages have one use, and the promised capacities are there."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphserve.configs.errors import OutOfBudget
from morphserve.quantize.manifest import Variant
from morphserve.runtime.memory import (
    MemoryPlan,
    ModelSizes,
    align,
    budget_for,
    choose_run,
    plan_memory,
)

KIB = 1024
FULL, INT8, INT4 = Variant.FULL, Variant.INT8, Variant.INT4


def demo_sizes() -> ModelSizes:
    """The demo model in bfloat16, with both variants."""
    return ModelSizes(
        static_bytes=2_100_224,
        image_bytes={
            FULL: (1_573_888,) * 12,
            INT8: (812_032,) * 12,
            INT4: (418_816,) * 12,
        },
        kv_bytes_per_token=512,
        block_tokens=16,
    )


def _shares(draw: st.DrawFn, full: list[int], share: int) -> list[int]:
    """About this share of each image, or as much as the next larger one."""
    return [align(nbytes // draw(st.integers(share - 1, share))) for nbytes in full]


@st.composite
def any_sizes(draw: st.DrawFn) -> ModelSizes:
    num_layers = draw(st.integers(1, 8))
    served = draw(st.sampled_from([((INT4, 4),), ((INT8, 2), (INT4, 4)), ((INT4, 4), (INT8, 2))]))
    full = [align(draw(st.integers(4 * KIB, 400 * KIB))) for _ in range(num_layers)]
    return ModelSizes(
        static_bytes=align(draw(st.integers(0, 100 * KIB))),
        image_bytes={
            variant: tuple(full) if share == 1 else tuple(_shares(draw, full, share))
            for variant, share in ((FULL, 1), *served)
        },
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
        used += range(offset // page, (offset + align(sizes.staged_bytes, page)) // page)
    used += pages_of(plan, plan.base_blocks)
    for slab in plan.slabs:
        used += range(slab.page, slab.page + slab.num_pages)
    assert len(used) == len(set(used))
    assert max(used) < plan.num_pages
    assert plan.num_bytes <= budget


@given(any_sizes())
def test_freed_blocks_end_before_the_image_in_use(sizes: ModelSizes) -> None:
    plan = plan_memory(sizes, budget_for(sizes, 1, 4 * KIB, 64), 1, 4 * KIB)
    for layer, slab in enumerate(plan.slabs):
        end = (slab.page + slab.num_pages) * sizes.page_bytes
        assert slab.offsets[FULL] + sizes.full_bytes[layer] <= end
        for variant in sizes.quantized:
            assert slab.offsets[variant] + sizes.image_bytes[variant][layer] == end
            for part in slab.freed_between(FULL, variant):
                for page in pages_of(plan, slab.blocks[part]):
                    assert slab.page <= page
                    assert (page + 1) * sizes.page_bytes <= slab.offsets[variant]


@given(any_sizes())
def test_int8_on_the_way_changes_nothing_of_what_int4_frees(sizes: ModelSizes) -> None:
    plan = plan_memory(sizes, budget_for(sizes, 1, 4 * KIB, 64), 1, 4 * KIB)
    for layer, slab in enumerate(plan.slabs):
        freed = [block for part in slab.blocks.values() for block in part]
        front = slab.offsets[INT4] // sizes.page_bytes - slab.page
        chunk = plan.run_blocks * sizes.num_layers
        assert len(freed) == len(set(freed)) == front // chunk * plan.run_blocks
        variants = [FULL] * sizes.num_layers
        variants[layer] = INT4
        assert plan.capacity(variants) == len(plan.base_blocks) + len(freed)


def test_capacity_grows_by_what_each_layer_frees() -> None:
    plan = plan_memory(demo_sizes(), 64 * 2**20, 2, 64 * KIB)
    base = len(plan.base_blocks)
    slab = plan.slabs[0]
    int8, rest = len(slab.blocks[INT8]), len(slab.blocks[INT4])
    assert int8 > 0 and rest > 0
    assert plan.capacity([FULL] * 12) == base
    assert plan.capacity([INT8, INT4, *[FULL] * 10]) == base + int8 + (int8 + rest)


def test_staging_holds_the_largest_image_that_is_put_aside() -> None:
    plan = plan_memory(demo_sizes(), 64 * 2**20, 2, 64 * KIB)
    assert plan.staging[1] - plan.staging[0] >= 812_032


def test_the_run_is_long_where_that_wastes_little() -> None:
    both = demo_sizes()
    int4_alone = {v: sizes for v, sizes in both.image_bytes.items() if v is not INT8}
    sizes = replace(both, image_bytes=int4_alone)
    assert choose_run(sizes, 64 * KIB) * sizes.page_bytes >= 64 * KIB


def test_the_run_is_short_where_a_long_one_would_leave_int8_little() -> None:
    sizes = demo_sizes()
    run = choose_run(sizes, 64 * KIB)
    plan = plan_memory(sizes, 64 * 2**20, 2, 64 * KIB)
    assert run * sizes.page_bytes < 64 * KIB
    assert len(plan.slabs[0].blocks[INT8]) == 7  # 93 pages before the image, 12 to a block


def test_a_budget_computed_for_some_tokens_holds_them() -> None:
    sizes = demo_sizes()
    plan = plan_memory(sizes, budget_for(sizes, 2, 64 * KIB, 2048), 2, 64 * KIB)
    assert len(plan.base_blocks) * sizes.block_tokens >= 2048


def test_a_budget_below_the_model_is_refused_with_the_number_that_fits() -> None:
    with pytest.raises(OutOfBudget, match=r"raise --memory-budget to \d+\.\d MiB"):
        plan_memory(demo_sizes(), 2**20, 2, 64 * KIB)
