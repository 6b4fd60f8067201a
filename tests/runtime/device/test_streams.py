"""Swaps on a device with streams: whatever is done late or early, no step reads a wrong byte."""

from collections.abc import Collection
from random import Random

import pytest
from simulated_streams import SIZES, VARIANTS, Engine

from morphserve.runtime.device import streams

ORDERS = 60  # in which streams are made to work
TURNS = 25


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PIECE_BYTES", 300)
    monkeypatch.setattr(streams, "PINNED_BYTES_PER_STEP", 900)


def serve(
    seed: int, without: Collection[str] = (), *, fails: str = "", is_pinned: bool = True
) -> Engine:
    """An engine after a few dozen steps among swaps, one of which fails on the stream `fails`."""
    random = Random(seed)
    engine = Engine(random, without, is_pinned=is_pinned)
    if fails:
        stream = engine.side if fails == "side" else engine.compute
        stream.fails_at = random.randint(1, 12 if fails == "side" else 4)
    for _ in range(TURNS):
        layer, to = random.randrange(SIZES.num_layers), random.choice(VARIANTS)
        engine.turn((layer, to) if random.random() < 0.7 else None)
    engine.finish()
    return engine


@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize("fails", ["", "side", "compute"])
def test_no_step_reads_a_wrong_byte_whatever_the_order(fails: str, is_pinned: bool) -> None:
    engines = [serve(seed, fails=fails, is_pinned=is_pinned) for seed in range(ORDERS)]
    assert [engine.wrong for engine in engines] == [[]] * ORDERS
    assert sum(engine.moved for engine in engines) > ORDERS
    assert sum(engine.swapped for engine in engines) > ORDERS
    assert bool(fails) == any(engine.swapper.failures for engine in engines)


@pytest.mark.parametrize(
    ("without", "fails"),
    [
        (["side waits"], ""),  # copies do not wait for steps that use their destinations
        (["compute waits"], "side"),  # steps do not wait for copies of a swap that was given up
        (["compute waits", "queries"], ""),  # commits do not wait for the bytes
    ],
)
def test_without_any_of_the_waits_some_order_goes_wrong(without: list[str], fails: str) -> None:
    assert any(serve(seed, without, fails=fails).wrong for seed in range(ORDERS))


def test_a_commit_that_comes_too_early_waits_on_the_device() -> None:
    assert not any(serve(seed, ["queries"]).wrong for seed in range(ORDERS))


def test_all_of_a_swap_is_asked_for_without_anything_being_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "PINNED_BYTES_PER_STEP", 10**6)
    engine = Engine(Random(0))
    swapper, to = engine.swapper, VARIANTS[-1]
    assert swapper.start(0, to)
    swapper.advance()
    assert not swapper.commit_ready()
    engine.compute_some(10**6)
    assert [swap.to for swap in swapper.commit_ready()] == [to]
    assert engine.layers.variants[0] is to


def test_a_device_that_fails_for_good_is_not_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Random(0))
    assert engine.swapper.start(0, VARIANTS[-1])

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("copy", "record", "wait"):
        monkeypatch.setattr(engine.side, name, fail, raising=True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.swapper.advance()
