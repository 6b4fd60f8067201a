"""What is captured when, what steps are then made of, and what happens when something fails."""

import logging
from collections.abc import Sequence

import pytest
import torch
from graph_driver import Drawn, GreedySampler, graph_driver, runner_of, staging
from swap_driver import ARCHITECTURE, Driver, prompt_of
from tape_graphs import TapeGpu, counted_launches

from morphserve.quantize.manifest import Variant
from morphserve.runtime.cuda import graphs
from morphserve.runtime.parts import DeviceLost, Launched
from morphserve.runtime.request import Request
from morphserve.runtime.scheduler import Batch

pytestmark = pytest.mark.usefixtures("fast_unpack")

Swaps = list[tuple[int, Variant]]


def small_driver(gpu: TapeGpu, warm: bool = True) -> Driver:
    return graph_driver(gpu, kv_tokens=900, max_num_seqs=4, warm=warm)


def settle_in(driver: Driver, swaps: Swaps, num_requests: int = 3) -> None:
    """Some requests decode, with these layers swapped."""
    for i in range(num_requests):
        driver.add(f"{len(driver.requests)}", prompt_of(i, 7), 200)
    driver.step(swaps)
    while driver.parts.swapper.in_flight:
        driver.step()


def steps_taken(driver: Driver, count: int) -> dict[str, int]:
    before = runner_of(driver).tally.steps.copy()
    for _ in range(count):
        driver.step()
    return dict(runner_of(driver).tally.steps - before)


def test_a_whole_step_is_one_launch_and_one_in_pieces_one_per_layer_and_two() -> None:
    driver = small_driver(TapeGpu())
    runner, launch, seen = runner_of(driver), runner_of(driver).launch, list[list[str]]()

    def counted(batch: Batch) -> Launched:
        with counted_launches() as launched:
            result = launch(batch)
        seen.append(launched)
        return result

    runner.launch = counted  # type: ignore[method-assign]
    settle_in(driver, [])
    steps_taken(driver, 1)
    settle_in(driver, [(1, Variant.INT4)], num_requests=0)
    steps_taken(driver, 1)
    eager, whole, pieces = seen[0], seen[1], seen[-1]
    assert eager.count("replay") == 0 and len(eager) > 30 * ARCHITECTURE.num_layers
    assert whole.count("replay") == 1
    assert pieces.count("replay") == ARCHITECTURE.num_layers + 2
    others = [name for name in whole if name != "replay"]
    assert others == [name for name in pieces if name != "replay"]
    assert others[-1] == "aten.clamp.out", "after the sampler, the tokens for the next step"


def test_idle_time_makes_pieces_whole() -> None:
    gpu = TapeGpu()
    driver = small_driver(gpu)
    runner = runner_of(driver)
    assert not runner.prepare()
    settle_in(driver, [(1, Variant.INT4)])
    assert steps_taken(driver, 5) == {"pieces": 5}
    captured = gpu.captures
    assert runner.prepare() and not runner.prepare()
    assert gpu.captures == captured + 1
    assert steps_taken(driver, 5) == {"whole": 5}


def test_a_mix_that_stays_is_captured_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "PAYS_AFTER", 6)
    driver = small_driver(TapeGpu())
    settle_in(driver, [(1, Variant.INT4)])
    assert steps_taken(driver, 4)["pieces"] <= 5
    assert steps_taken(driver, 8)["whole"] > 0
    assert steps_taken(driver, 3) == {"whole": 3}


def test_few_graphs_are_kept_beside_those_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_EXTRA", 2)
    driver = small_driver(TapeGpu())
    runner, at_start = runner_of(driver), runner_of(driver).tally.whole
    settle_in(driver, [(1, Variant.INT4)])
    for layer in (0, 2, 3):
        steps_taken(driver, 3)
        assert runner.prepare()
        settle_in(driver, [(layer, Variant.INT4)], num_requests=0)
        assert runner.tally.whole <= at_start + 2
    assert runner.tally.whole == at_start + 2
    for layer in (0, 1, 2, 3):
        settle_in(driver, [(layer, Variant.FULL)], num_requests=0)
    assert steps_taken(driver, 3) == {"whole": 3}, "those of the start are kept"


def test_captures_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    gpu = TapeGpu()
    with caplog.at_level(logging.INFO):
        tally = runner_of(small_driver(gpu)).tally
    assert tally.whole + tally.pieces == gpu.captures
    mib = 2**16 * gpu.captures / 2**20
    assert caplog.messages[-1].startswith(f"captured {gpu.captures} graphs in ")
    assert caplog.messages[-1].endswith(f" s, {mib:.0f} MiB")


def test_a_step_that_fails_can_be_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = small_driver(TapeGpu())
    runner = runner_of(driver)
    for i in range(3):
        driver.add(f"{i}", prompt_of(i, 7), 20)
    wanted = small_driver(TapeGpu())
    for i in range(3):
        wanted.add(f"{i}", prompt_of(i, 7), 20)
    wanted.run(lambda turn: [])
    driver.step()

    class Failing(GreedySampler):
        def launch(self, logits: torch.Tensor, requests: Sequence[Request]) -> Drawn:
            if len(requests) > 1:
                raise RuntimeError("out of something")
            return super().launch(logits, requests)

    monkeypatch.setattr(runner, "_sampler", Failing())
    scheduler = driver.parts.scheduler
    for _ in range(19):
        batch = scheduler.schedule()
        with pytest.raises(RuntimeError, match="out of something"):
            runner.launch(batch)
        sampled = [runner.launch([piece]).result()[0] for piece in batch]
        scheduler.update(batch, [got.token for got in sampled])
    assert [r.output for r in driver.requests.values()] == [
        r.output for r in wanted.requests.values()
    ]


def test_a_lost_device_is_told_from_a_step_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = TapeGpu()
    driver = small_driver(gpu, warm=False)
    driver.add("a", prompt_of(0, 7), 20)
    batch = driver.parts.scheduler.schedule()

    def launch(*args: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner_of(driver)._sampler, "launch", launch)
    gpu.lost = True
    with pytest.raises(DeviceLost, match="illegal memory access"):
        driver.parts.runner.launch(batch)


def test_after_a_row_that_is_not_finite_the_next_step_goes_on_from_token_0() -> None:
    driver = small_driver(TapeGpu())
    runner = runner_of(driver)
    for i in range(2):
        driver.add(f"{i}", prompt_of(i, 7), 20)
    driver.step()
    scheduler = driver.parts.scheduler
    batch = scheduler.schedule()
    for layer in range(ARCHITECTURE.num_layers):
        driver.arena.cache(layer, torch.float32)[batch[0].request.blocks[0]] = float("nan")
    launched = runner.launch(batch)
    scheduler.launched(batch)
    runner.launch(scheduler.schedule())
    assert runner._inputs.tokens[:2].tolist() == [0, launched.result()[1].token]
    assert launched.result()[0].token is None


def test_one_sequence_at_a_time_can_be_served() -> None:
    driver = graph_driver(TapeGpu(), max_num_seqs=1)
    for i in range(2):
        driver.add(f"{i}", prompt_of(i, 30), 4)
    driver.run(lambda turn: [])
    assert runner_of(driver).tally.steps == {"eager": 4, "whole": 6, "pieces": 0}


def test_layers_that_never_change_need_no_pieces() -> None:
    driver = small_driver(TapeGpu(), warm=False)
    runner = runner_of(driver)
    runner.warm_up([[weights] for weights in driver.parts.layers.active], staging(driver))
    assert runner.tally.whole == 3 and runner.tally.pieces == 0
