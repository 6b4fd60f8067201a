"""Blocks keep their content wherever they are copied."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphserve.quantize.manifest import Variant
from morphserve.runtime.arena import Arena, _runs
from morphserve.runtime.device.host import HostDevice
from morphserve.runtime.memory import MemoryPlan, ModelSizes, budget_for, plan_memory


def plan_of(num_layers: int, page_tokens_bytes: int, min_run_bytes: int) -> MemoryPlan:
    images = {Variant.FULL: (1024,) * num_layers}
    sizes = ModelSizes(0, images, kv_bytes_per_token=page_tokens_bytes, block_tokens=4)
    return plan_memory(sizes, budget_for(sizes, 0, min_run_bytes, 64), 0, min_run_bytes)


@pytest.mark.parametrize("page_tokens_bytes", [16, 6])  # words of eight bytes, and of one
@pytest.mark.parametrize("num_layers", [1, 3])
@given(data=st.data())
@settings(max_examples=25)
def test_a_block_has_its_content_of_every_layer_where_it_goes(
    num_layers: int, page_tokens_bytes: int, data: st.DataObject
) -> None:
    plan = plan_of(num_layers, page_tokens_bytes, min_run_bytes=3 * 4 * page_tokens_bytes)
    arena = Arena(plan, HostDevice())
    arena.bytes.random_(generator=torch.Generator().manual_seed(1))
    shuffled = data.draw(st.permutations(plan.base_blocks))
    half = data.draw(st.integers(0, len(shuffled) // 2))
    old, new = shuffled[:half], shuffled[half : 2 * half]
    if data.draw(st.booleans()):
        old, new = sorted(old), sorted(new)
    blocks = torch.tensor(plan.base_blocks)
    place = {block: i for i, block in enumerate(plan.base_blocks)}
    before = [arena.cache(layer, torch.uint8)[blocks] for layer in range(num_layers)]
    arena.copy_blocks(dict(zip(old, new, strict=True)))
    for layer, expected in enumerate(before):
        expected[[place[block] for block in new]] = expected[[place[block] for block in old]]
        assert torch.equal(arena.cache(layer, torch.uint8)[blocks], expected)


def test_adjacent_blocks_are_copied_at_once() -> None:
    assert list(_runs({3: 13, 1: 11, 2: 12, 7: 5, 8: 4, 20: 9})) == [
        (1, 11, 3),
        (7, 5, 1),
        (8, 4, 1),
        (20, 9, 1),
    ]
    assert list(_runs({})) == []
