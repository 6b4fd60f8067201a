"""Runs with graphs give the tokens of runs without, whatever is swapped, grown or padded."""

import logging
import random
from functools import cache

import pytest
from graph_driver import graph_driver, runner_of
from swap_driver import ARCHITECTURE, ORDER, Driver, prompt_of, tiny_model
from tape_graphs import TapeGpu

from morphserve.quantize.manifest import Variant
from morphserve.runtime.kernels.reference import ReferenceKernels
from morphserve.runtime.parts import Launched
from morphserve.runtime.request import Status
from morphserve.runtime.scheduler import Batch

pytestmark = pytest.mark.usefixtures("fast_unpack")

PROMPTS = [3, 9, 17, 30, 5, 12, 26, 8, 2, 40, 11]
Swaps = list[tuple[int, Variant]]


def add_requests(driver: Driver, seed: int) -> None:
    lengths = random.Random(seed)
    for i, length in enumerate(PROMPTS):
        driver.add(f"r{i}", prompt_of(i, length), max_tokens=lengths.randint(3, 90))


def random_swaps(seed: int) -> dict[int, Swaps]:
    """By turn; it begins and ends at full precision."""
    rng = random.Random(seed)
    swaps: dict[int, Swaps] = {}
    for turn in range(20, 60):
        if rng.random() < 0.4:
            swaps[turn] = [(rng.choice(ORDER), rng.choice(list(Variant)))]
    return swaps | {70 + i: [(i, Variant.FULL)] for i in range(ARCHITECTURE.num_layers)}


def outputs_of(driver: Driver) -> dict[str, list[int]]:
    return {name: request.output for name, request in driver.requests.items()}


def run(driver: Driver, seed: int) -> dict[str, list[int]]:
    add_requests(driver, seed)
    swaps = random_swaps(seed)
    driver.run(lambda turn: swaps.get(turn, []))
    return outputs_of(driver)


@cache
def plain_run(seed: int) -> dict[str, list[int]]:
    return run(Driver(tiny_model(ReferenceKernels()), 400, max_num_seqs=12), seed)


def run_overlapped(driver: Driver, seed: int) -> dict[str, list[int]]:
    """As `run`, each step launched before the tokens of the one before it are read."""
    add_requests(driver, seed)
    swaps, parts = random_swaps(seed), driver.parts
    scheduler, ahead = parts.scheduler, list[tuple[Batch, Launched]]()

    def settle() -> None:
        for batch, launched in ahead:
            sampled = iter(launched.result())
            got = [(piece, next(sampled) if piece.samples else None) for piece in batch]
            live = [(p, s) for p, s in got if p.request.status is not Status.FINISHED]
            scheduler.computed([p for p, _ in live], [s.token for _, s in live if s is not None])
        ahead.clear()

    for turn in range(400):
        parts.swapper.commit_ready()
        for layer, to in swaps.get(turn, []):
            if parts.swapper.has_room and parts.layers.variants[layer] is not to:
                if all(swap.layer != layer for swap in parts.swapper.in_flight):
                    parts.swapper.start(layer, to)
        rung = parts.ladder.rung_of(parts.layers.variants)
        if scheduler.must_know(rung):
            settle()
        batch = scheduler.schedule(rung)
        parts.swapper.advance()
        launched = parts.runner.launch(batch) if batch else None
        settle()
        if launched is not None:
            scheduler.launched(batch)
            ahead.append((batch, launched))
    assert all(request.status is Status.FINISHED for request in driver.requests.values())
    return outputs_of(driver)


@pytest.mark.parametrize("seed", range(3))
def test_graphs_change_no_token_while_layers_are_swapped(seed: int) -> None:
    gpu = TapeGpu()
    driver = graph_driver(gpu)
    captured = gpu.captures
    assert run(driver, seed) == plain_run(seed)
    steps = runner_of(driver).tally.steps
    assert steps["whole"] > 10 and steps["pieces"] > 10 and steps["eager"] > 5
    assert gpu.captures == captured, "a step captured something"


@pytest.mark.parametrize("seed", range(2))
def test_steps_may_be_launched_before_the_last_ones_tokens_are_known(seed: int) -> None:
    assert run_overlapped(graph_driver(TapeGpu()), seed) == plain_run(seed)


def test_a_step_writes_the_pages_of_its_tokens_alone() -> None:
    driver = graph_driver(TapeGpu())
    arena, launch, run_blocks = driver.arena, driver.parts.runner.launch, driver.plan.run_blocks
    pages = arena.bytes.view(driver.plan.num_pages, -1)

    def watched(batch: Batch) -> Launched:
        before = pages.clone()
        launched = launch(batch)
        blocks = {
            piece.request.blocks[i // 8] for piece in batch for i in range(piece.start, piece.end)
        }
        mine = {b + i * run_blocks for b in blocks for i in range(ARCHITECTURE.num_layers)}
        written = (pages != before).any(dim=1).nonzero().flatten().tolist()
        assert set(written) == mine
        return launched

    driver.parts.runner.launch = watched  # type: ignore[method-assign]
    run(driver, 0)


@pytest.mark.parametrize("num_captures", [0, 4, 40])
def test_a_failed_capture_costs_time_and_nothing_else(
    num_captures: int, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = TapeGpu(fails=lambda count: count >= num_captures)
    with caplog.at_level(logging.INFO):
        driver = graph_driver(gpu)
        assert run(driver, 1) == plain_run(1)
    tally = runner_of(driver).tally
    assert tally.whole + tally.pieces <= gpu.captures == num_captures
    assert "RuntimeError: operation not permitted" in tally.failure
    assert sum("could not be captured" in record.message for record in caplog.records) == 1
    assert not runner_of(driver).prepare()
