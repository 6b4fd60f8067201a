"""Tokens are the same with the prefix cache and without, whatever moves under it."""

from collections.abc import Callable, Sequence

import pytest
import torch
from swap_driver import ARCHITECTURE, ORDER, Driver, prompt_of, tiny_model
from torch import Tensor

from morphserve.quantize.manifest import Variant
from morphserve.runtime.kernels import Kernels, load_kernels
from morphserve.runtime.request import Request, Status

FULL, INT4 = Variant.FULL, Variant.INT4
Script = Callable[[int], Sequence[tuple[int, Variant]]]


@pytest.fixture(scope="module")
def cpu() -> Kernels:
    """Whose results do not depend on how a prompt is cut into chunks."""
    return load_kernels("cpu")


def down_and_up(turn: int) -> Sequence[tuple[int, Variant]]:
    """All layers down in the order, then all back, again and again, two at a time."""
    phase, to = divmod(turn % 60, 30)
    layers = ORDER if phase == 0 else ORDER[::-1]
    return [(layer, INT4 if phase == 0 else FULL) for layer in layers[: to + 1]]


def no_swaps(turn: int) -> Sequence[tuple[int, Variant]]:
    return ()


def conversations(driver: Driver, script: Script) -> dict[str, Request]:
    """Three waves of requests; each goes on from one of four beginnings, or from an output."""
    beginnings = [prompt_of(seed, 30 + 9 * seed) for seed in range(4)]
    for wave in range(3):
        for i, beginning in enumerate(beginnings * 2):
            own = prompt_of(100 + 10 * wave + i, 1 + i)
            driver.add(f"{wave}.{i}", beginning + own, max_tokens=30 + 11 * (i % 3))
        driver.run(lambda turn, wave=wave: script(turn + 25 * wave))
        first = driver.requests[f"{wave}.0"]
        beginnings[0] = first.prompt + first.output
    return driver.requests


def kv_of(driver: Driver, request: Request) -> Tensor:
    """K and V of the request's full blocks: [layers, blocks, elements]."""
    full = request.blocks[: request.num_computed // 8]
    layers = range(ARCHITECTURE.num_layers)
    return torch.stack([driver.arena.cache(i, torch.float32)[full] for i in layers])


def test_tokens_are_the_same_with_hits_and_without_across_swaps_and_preemptions(
    cpu: Kernels,
) -> None:
    model = tiny_model(cpu, exact=True)
    sharing = Driver(model, kv_tokens=160, prefix_caching=True)
    plain = Driver(model, kv_tokens=4096)
    mine, other = conversations(sharing, down_and_up), conversations(plain, no_swaps)
    scheduler = sharing.parts.scheduler
    assert sharing.moved > 0 and scheduler.num_preemptions > 0
    assert scheduler.reuse.hits > 0 and plain.parts.scheduler.reuse.hits == 0
    for name, request in other.items():
        assert mine[name].output == request.output
    assert sharing.parts.pool.num_used == 0


def test_hits_save_what_they_say_and_leave_the_same_tokens_at_full_precision(cpu: Kernels) -> None:
    model = tiny_model(cpu)
    sharing = Driver(model, kv_tokens=2048, prefix_caching=True)
    plain = Driver(model, kv_tokens=2048)
    computed = {}
    for driver in (sharing, plain):
        for name in ("first", "second"):
            driver.add(name, prompt_of(3, 45), max_tokens=20)
            count = 0
            while driver.requests[name].status is not Status.FINISHED:
                count += sum(piece.end - piece.start for piece in driver.step())
            computed[driver is sharing, name] = count
    assert computed[True, "first"] == computed[False, "second"] == 45 + 19
    assert computed[True, "second"] == 45 + 19 - 40
    assert sharing.requests["second"].num_cached_tokens == 40
    assert sharing.requests["second"].output == plain.requests["first"].output


def test_shared_kv_has_the_bits_that_the_request_would_have_computed_itself(cpu: Kernels) -> None:
    model = tiny_model(cpu)
    sharing = Driver(model, kv_tokens=2048, prefix_caching=True)
    plain = Driver(model, kv_tokens=2048, max_num_batched_tokens=11)
    sharing.add("first", prompt_of(3, 45), max_tokens=40)
    for _ in range(5):
        sharing.step()
    for driver in (sharing, plain):
        driver.add("second", prompt_of(3, 45) + prompt_of(4, 9), max_tokens=20)
        for _ in range(9):
            driver.step()
    mine, other = sharing.requests["second"], plain.requests["second"]
    assert mine.blocks[:5] == sharing.requests["first"].blocks[:5]
    count = min(mine.num_computed, other.num_computed) // 8
    assert count > 5
    assert torch.equal(kv_of(sharing, mine)[:, :count], kv_of(plain, other)[:, :count])


def test_after_a_burst_nobody_inherits_its_kv_at_full_precision(cpu: Kernels) -> None:
    model = tiny_model(cpu)
    driver = Driver(model, kv_tokens=2048, prefix_caching=True)

    def move(to: Variant) -> None:
        while set(driver.parts.layers.variants) != {to} or driver.parts.swapper.in_flight:
            driver.step([(layer, to) for layer in ORDER])

    def tokens(name: str) -> list[int]:
        request = driver.add(name, prompt_of(3, 45), max_tokens=20)
        driver.run(no_swaps)
        return request.output

    move(INT4)
    rough = tokens("rough")
    move(FULL)
    fine = tokens("fine")
    move(INT4)
    tokens("again")
    hits = {name: request.num_cached_tokens for name, request in driver.requests.items()}
    assert hits == {"rough": 0, "fine": 0, "again": 40}
    still = Driver(model, kv_tokens=2048)
    request = still.add("alone", prompt_of(3, 45), max_tokens=20)
    still.run(no_swaps)
    assert fine == request.output != rough
