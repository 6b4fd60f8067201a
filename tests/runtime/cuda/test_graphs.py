"""Runs with graphs give the tokens of runs without, whatever is swapped, grown or padded."""

import random

import pytest
from graph_driver import Script, graph_driver, runner_of
from swap_driver import ORDER, Driver, prompt_of, tiny_model
from tape_graphs import TapeGpu

from morphserve.quantize.manifest import Variant
from morphserve.runtime.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.usefixtures("fast_unpack")

PROMPTS = [3, 9, 17, 30, 5, 12, 26, 8, 2, 40, 11]


def add_requests(driver: Driver, seed: int) -> None:
    lengths = random.Random(seed)
    for i, length in enumerate(PROMPTS):
        driver.add(f"r{i}", prompt_of(i, length), max_tokens=lengths.randint(3, 90))


def random_swaps(seed: int) -> Script:
    rng = random.Random(seed)
    turns = {
        turn: [(rng.choice(ORDER), rng.choice(list(Variant)))]
        for turn in range(20, 90)
        if rng.random() < 0.4
    }
    return lambda turn: turns.get(turn, [])


def outputs_of(driver: Driver) -> dict[str, list[int]]:
    return {name: request.output for name, request in driver.requests.items()}


def run(driver: Driver, seed: int) -> dict[str, list[int]]:
    add_requests(driver, seed)
    driver.run(random_swaps(seed))
    return outputs_of(driver)


@pytest.mark.parametrize("seed", range(3))
def test_graphs_change_no_token_while_layers_are_swapped(seed: int) -> None:
    plain = Driver(tiny_model(ReferenceKernels()), 400, max_num_seqs=12)
    gpu = TapeGpu()
    driver = graph_driver(gpu)
    captured = gpu.captures
    assert run(driver, seed) == run(plain, seed)
    steps = runner_of(driver).tally.steps
    assert steps["whole"] > 0 and steps["pieces"] > 10 and steps["eager"] > 0
    assert gpu.captures == captured, "a step captured something"
