"""An engine over the GPU's step runner: its answers, while requests come and go and layers swap."""

from dataclasses import replace
from functools import cache
from random import Random

import overlap_scenes
import pytest
from deferred_runner import use_runner
from graph_driver import GreedySampler
from overlap_scenes import AMPLE, EOS, TIGHT, Ask, Client, check_answers, engine_of, greedy
from plain_unpack import plain_unpack
from step_kernels import StepKernels
from swap_driver import tiny_model
from tape_graphs import TapeGpu

from morphserve.quantize.manifest import Variant
from morphserve.runtime.build import DeviceParts
from morphserve.runtime.cuda.inputs import Limits
from morphserve.runtime.cuda.runner import CudaRunner
from morphserve.runtime.loader import LoadedModel

TURNS = 30


@pytest.fixture(autouse=True)
def kernels_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the answers that should come, too."""
    answers: dict[str, tuple[list[int], str | None]] = {}
    monkeypatch.setattr(overlap_scenes, "model", model)
    monkeypatch.setattr(overlap_scenes, "_still", cache(lambda: engine_of(AMPLE)))
    monkeypatch.setattr(overlap_scenes, "_answers", lambda: answers)
    monkeypatch.setattr("morphserve.runtime.cuda.inputs.unpack", plain_unpack)


@cache
def model() -> LoadedModel:
    loaded = tiny_model(StepKernels(), exact=True)
    return replace(loaded, architecture=replace(loaded.architecture, eos_token_ids=EOS))


def client_of_the_step_runner() -> tuple[Client, CudaRunner]:
    client = Client(engine_of(TIGHT))
    parts, limits = client.engine._parts, Limits(max_tokens=24, max_seqs=5, max_blocks=8)
    assert isinstance(parts, DeviceParts)
    runner = CudaRunner(TapeGpu(), StepKernels(), parts.model, GreedySampler(), limits)
    use_runner(client.engine, runner)
    return client, runner


def act(random: Random, client: Client) -> None:
    if random.random() < 0.4:
        stops = random.choice([(), tuple(range(3, 96, 9))])
        least = random.choice([Variant.INT4] * 5 + [Variant.INT8])
        params = greedy(20, stop_token_ids=stops)
        client.submit(Ask(random.randrange(3), random.choice([5, 17, 30]), params, least))
    if random.random() < 0.1 and client.asked:
        client.abort(random.choice(list(client.asked)))
    if random.random() < 0.3:
        client.engine.pin(random.choice((None, 0, 2, 5, 8, 10)))


def serve(random: Random, client: Client) -> None:
    """For a while, and then nothing, in which graphs are captured."""
    for _ in range(TURNS):
        act(random, client)
        client.step()
    client.engine.pin(0)
    client.drain()
    for _ in range(20):
        client.step()


def test_answers_are_those_of_an_engine_that_waits_for_each_step() -> None:
    swaps = preemptions = replayed = 0
    for seed in range(3):
        random, (client, runner) = Random(seed), client_of_the_step_runner()
        serve(random, client)
        serve(random, client)
        check_answers(client)
        state = client.engine.snapshot()
        swaps, preemptions = swaps + state.swaps, preemptions + state.preemptions
        replayed += runner.tally.steps["whole"]
    assert swaps > 50 and preemptions > 2 and replayed > 20
