"""Requests in flight keep their state while layers swap and the KV cache grows and shrinks."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swap_driver import ARCHITECTURE, ORDER, Driver, prompt_of, tiny_model
from torch import Tensor

from morphserve.quantize.manifest import Variant
from morphserve.runtime.kernels import Kernels, load_kernels
from morphserve.runtime.layers import LayerWeights, weights_at
from morphserve.runtime.model import Model
from morphserve.runtime.request import Request
from morphserve.runtime.runner import pack
from morphserve.runtime.scheduler import Slice

FULL, INT8, INT4 = Variant.FULL, Variant.INT8, Variant.INT4
Script = Callable[[int], Sequence[tuple[int, Variant]]]


def down_and_up(turn: int) -> Sequence[tuple[int, Variant]]:
    """All layers down in the order, then all back, again and again, two at a time.

    The first time by way of INT8, the second time straight to INT4 and straight back.
    """
    phase, taken = divmod(turn % 72, 12)
    to = (INT8, INT4, INT8, FULL, INT4, FULL)[phase]
    layers = ORDER if phase in (0, 1, 4) else ORDER[::-1]
    return [(layer, to) for layer in layers[: taken + 1]]


def no_swaps(turn: int) -> Sequence[tuple[int, Variant]]:
    return ()


def add_requests(driver: Driver, count: int = 6) -> None:
    for i in range(count):
        driver.add(f"r{i}", prompt_of(i, 9 + 13 * (i % 4)), max_tokens=20 + 7 * (i % 3))


def replay(driver: Driver, request: Request) -> list[int]:
    """The request's tokens from a run of its own, in memory that never changes.

    The tokens are computed in the same slices with the same variants as in the driver's run, but
    from weights that lie still: each variant in an arena of its own.
    """
    still = Driver(driver.model, kv_tokens=512)
    views = {FULL: list(still.parts.layers.active)}
    for variant in (INT8, INT4):
        views[variant] = _placed(Driver(driver.model, kv_tokens=512), variant)
    base: Model = still.parts.runner._model
    alone = Request(request.id, request.prompt, request.params, arrival_s=0.0)
    alone.blocks = list(still.plan.base_blocks[:40])
    for start, end, variants in driver.precisions[request.id]:
        layers = [views[variant][i] for i, variant in enumerate(variants)]
        model = Model(base.kernels, base.static, layers, base.caches, base.cos_sin, base.shape)
        alone.output = request.output[: max(0, end - len(request.prompt))]
        logits = forward(model, alone, start, end)
        if end >= len(request.prompt):
            assert int(logits.argmax()) == request.output[end - len(request.prompt)]
            alone.output = request.output[: end - len(request.prompt) + 1]
    return alone.output


def _placed(driver: Driver, variant: Variant) -> list[LayerWeights]:
    """Views of every layer's image of this variant, copied into the driver's arena."""
    views = []
    for slab, image in zip(driver.plan.slabs, driver.model.images[variant], strict=True):
        offset = slab.offsets[variant]
        driver.arena.span(offset, image.num_bytes).copy_(image.host)
        views.append(weights_at(driver.arena, offset, image))
    return views


@torch.inference_mode()
def forward(model: Model, request: Request, start: int, end: int) -> Tensor:
    tokens, meta, _ = pack([Slice(request, start, end)], model.shape.block_tokens)
    return model.forward(tokens, meta, torch.tensor([end - start - 1]))


def test_tokens_are_those_of_a_run_with_the_same_precision_at_the_same_tokens(
    kernels: Kernels,
) -> None:
    driver = Driver(tiny_model(kernels), kv_tokens=120)
    add_requests(driver)
    driver.run(down_and_up)
    assert driver.moved > 0, "the script evacuated no live block"
    mixed = {v for p in driver.precisions.values() for _, _, variants in p for v in variants}
    assert mixed == {FULL, INT8, INT4}
    for request in driver.requests.values():
        assert replay(driver, request) == request.output


def test_tokens_are_untouched_when_both_images_stand_for_the_same_weights(
    kernels: Kernels,
) -> None:
    model = tiny_model(kernels, exact=True)
    swapping, still = Driver(model, kv_tokens=120), Driver(model, kv_tokens=1200)
    for driver, script in ((swapping, down_and_up), (still, no_swaps)):
        add_requests(driver)
        driver.run(script)
    assert swapping.moved > 0
    for name, request in still.requests.items():
        assert swapping.requests[name].output == request.output


def test_logits_are_bit_identical_across_swaps_of_equal_weights(kernels: Kernels) -> None:
    model = tiny_model(kernels, exact=True)
    swapping, still = Driver(model, kv_tokens=1200), Driver(model, kv_tokens=1200)
    add_requests(swapping)
    add_requests(still)
    for turn in range(40):
        a, b = swapping.step(down_and_up(turn)), still.step()
        if not a:
            break
        assert [(s.request.id, s.start, s.end) for s in a] == [
            (s.request.id, s.start, s.end) for s in b
        ]
        for mine, other in zip(a, b, strict=True):
            if mine.request.blocks:  # it has not ended with this step
                x = forward(swapping.parts.runner._model, mine.request, mine.start, mine.end)
                y = forward(still.parts.runner._model, other.request, other.start, other.end)
                assert torch.equal(x, y)


def test_kv_capacity_follows_the_layers(kernels: Kernels) -> None:
    driver = Driver(tiny_model(kernels), kv_tokens=120)
    pool, plan = driver.parts.pool, driver.plan
    base = pool.capacity
    driver.step([(3, INT4), (0, INT4)])
    driver.step()
    gained = [sum(len(plan.slabs[layer].blocks[v]) for v in (INT8, INT4)) for layer in (3, 0)]
    assert min(gained) > 0
    assert pool.capacity == base + sum(gained)
    driver.step([(0, FULL), (3, FULL)])
    assert pool.capacity == base, "blocks leave the pool when the promotion starts"
    driver.step()
    assert driver.parts.layers.variants == [FULL] * ARCHITECTURE.num_layers


def test_a_layer_frees_by_way_of_int8_what_it_frees_at_once(kernels: Kernels) -> None:
    driver = Driver(tiny_model(kernels), kv_tokens=120)
    pool, layer = driver.parts.pool, ORDER[0]
    seen = []
    for to in (INT8, INT4, INT8, FULL, INT4, FULL):
        driver.step([(layer, to)])
        driver.step()
        assert driver.parts.layers.variants[layer] is to
        assert pool.capacity == driver.plan.capacity(driver.parts.layers.variants)
        seen.append(pool.capacity)
    int8, int4, full = seen[0], seen[1], seen[3]
    assert full < int8 < int4
    assert seen == [int8, int4, int8, full, int4, full]


@pytest.mark.parametrize("to", [INT8, FULL])
def test_blocks_of_one_part_do_not_move_into_the_other_that_is_emptied_too(
    kernels: Kernels, to: Variant
) -> None:
    driver = Driver(tiny_model(kernels), kv_tokens=120)
    layer = ORDER[0]
    driver.step([(layer, INT4)])
    driver.step()
    pool, parts = driver.parts.pool, driver.plan.slabs[layer].blocks
    every = pool.allocate(pool.capacity)
    pool.free(sorted(set(every) - set(parts[INT4])))  # live blocks lie in INT4's part alone
    taken: dict[int, int] = {}
    driver.parts.swapper._relocate = taken.update
    assert driver.parts.swapper.start(layer, to)
    assert set(taken) == set(parts[INT4])
    gone = set(parts[INT4]) | (set(parts[INT8]) if to is FULL else set())
    assert not set(taken.values()) & gone


def test_promotion_waits_until_live_blocks_find_room(kernels: Kernels) -> None:
    driver = Driver(tiny_model(kernels), kv_tokens=120)
    for layer in ORDER[:2]:
        driver.step([(layer, INT4)])
    driver.step()
    pool, swapper = driver.parts.pool, driver.parts.swapper
    taken = pool.allocate(pool.num_free)
    capacity = pool.capacity
    assert not swapper.start(ORDER[1], FULL)
    assert (pool.capacity, driver.parts.layers.variants[ORDER[1]]) == (capacity, INT4)
    pool.free(taken)
    assert swapper.start(ORDER[1], FULL)


class Failing:
    """A copy that fails the n-th time it is called."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self, destination: Tensor, source: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            destination[: len(destination) // 2].fill_(255)
            raise RuntimeError("injected")
        destination.copy_(source)


def test_a_promotion_that_finds_room_for_one_part_only_keeps_both_in_use(
    kernels: Kernels,
) -> None:
    driver = Driver(tiny_model(kernels), kv_tokens=120)
    layer = ORDER[0]
    driver.step([(layer, INT4)])
    driver.step()
    pool, slab = driver.parts.pool, driver.plan.slabs[layer]
    tables = [pool.allocate(pool.capacity)]
    driver.parts.swapper._relocate = lambda moves: tables.append(
        [moves.get(block, block) for block in tables.pop()]
    )
    room = tables[0][: len(slab.blocks[INT4])]
    pool.free(room)
    tables = [[block for block in tables[0] if block not in room]]
    before = pool.capacity
    for block in tables[0]:
        driver.arena.cache(0, torch.float32)[block] = float(tables[0].index(block))
    assert not driver.parts.swapper.start(layer, FULL)
    assert (pool.capacity, driver.parts.layers.variants[layer]) == (before, INT4)
    pool.check(tables)
    read = [driver.arena.cache(0, torch.float32)[block][0].item() for block in tables[0]]
    assert read == list(range(len(tables[0])))
    assert driver.parts.swapper.start(layer, INT8)


PAIRS = [(a, b) for a in (FULL, INT8, INT4) for b in (FULL, INT8, INT4) if a is not b]


@pytest.mark.parametrize(("was", "to"), PAIRS)
def test_a_swap_that_fails_anywhere_leaves_everything_as_before(was: Variant, to: Variant) -> None:
    model = tiny_model(load_kernels("reference"))
    layer, nth = ORDER[0], 0
    while True:
        nth += 1
        driver = Driver(model, kv_tokens=120)
        add_requests(driver, 3)
        if was is not FULL:
            driver.step([(layer, was)])
            driver.step()
        parts = driver.parts
        before = parts.layers.variants[layer], parts.pool.capacity
        assert before[0] is was
        image, offset = model.images[was][layer], driver.plan.slabs[layer].offsets[was]
        failing = Failing(nth)
        parts.swapper._link.copy = failing
        driver.step([(layer, to)])
        driver.step()
        if failing.left > 0:
            break
        assert (parts.layers.variants[layer], parts.pool.capacity) == before
        assert torch.equal(driver.arena.span(offset, image.num_bytes), image.host)
        assert len(parts.swapper.failures) == 1
        driver.run(no_swaps)
        for request in driver.requests.values():
            assert replay(driver, request) == request.output
    assert nth > 2, "no copy was made to fail"


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_interleaving_of_requests_swaps_and_aborts_keeps_every_token(
    data: st.DataObject,
) -> None:
    driver = Driver(tiny_model(load_kernels("reference")), kv_tokens=120)
    layers = st.sampled_from(range(ARCHITECTURE.num_layers))
    for turn in range(data.draw(st.integers(5, 40))):
        action = data.draw(st.sampled_from(["add", "swap", "abort", "step", "step"]))
        swaps: list[tuple[int, Variant]] = []
        if action == "add":
            length, output = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 30))
            driver.add(f"r{turn}", prompt_of(turn, length), output)
        elif action == "swap":
            swaps = [(data.draw(layers), data.draw(st.sampled_from([FULL, INT8, INT4])))]
        elif action == "abort" and driver.requests:
            name = data.draw(st.sampled_from(sorted(driver.requests)))
            driver.parts.scheduler.abort(name)
        driver.step(swaps)
    if driver.requests:
        driver.run(no_swaps)
    assert driver.parts.pool.num_used == 0
    for request in driver.requests.values():
        if request.finish_reason and request.finish_reason.value == "length":
            assert replay(driver, request) == request.output
