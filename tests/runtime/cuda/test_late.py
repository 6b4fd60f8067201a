"""Steps that the device runs long after they were launched, as late as the host allows."""

from collections import deque
from functools import partial

import pytest
from graph_driver import graph_driver, runner_of
from plain_unpack import plain_unpack
from swap_driver import Driver, prompt_of, tiny_model
from tape_graphs import TapeGpu

from morphserve.runtime.kernels.reference import ReferenceKernels
from morphserve.runtime.parts import Launched
from morphserve.runtime.request import Status
from morphserve.runtime.scheduler import Batch


def add_requests(driver: Driver) -> None:
    for i, length in enumerate((3, 9, 17, 30, 5, 12, 2)):
        driver.add(f"{i}", prompt_of(i, length), max_tokens=5 + 7 * i)


def outputs_of(driver: Driver) -> list[list[int]]:
    return [request.output for request in driver.requests.values()]


def test_nothing_that_a_step_reads_changes_before_it_is_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = TapeGpu()

    def unpack(*args: object, **sizes: int) -> None:
        gpu.launch(partial(plain_unpack, *args, **sizes))  # type: ignore[arg-type]

    monkeypatch.setattr("morphserve.runtime.cuda.inputs.unpack", unpack)
    driver = graph_driver(gpu, max_num_seqs=5)
    add_requests(driver)
    scheduler, ahead = driver.parts.scheduler, deque[tuple[Batch, Launched]]()

    def settle() -> None:
        batch, launched = ahead.popleft()
        launched.end.synchronize()
        got = iter(launched.result())
        pairs = [(piece, next(got) if piece.samples else None) for piece in batch]
        live = [(p, s) for p, s in pairs if p.request.status is not Status.FINISHED]
        scheduler.computed([p for p, _ in live], [s.token for _, s in live if s is not None])

    while scheduler.has_work or ahead:
        if ahead and scheduler.must_know(0):
            settle()
        batch = scheduler.schedule()
        if batch:
            with gpu.late():
                launched = driver.parts.runner.launch(batch)
            ahead.append((batch, launched))
        if len(ahead) > 1 or not batch:
            settle()
        if batch:
            scheduler.launched(batch)
    plain = Driver(tiny_model(ReferenceKernels()), 400, max_num_seqs=5)
    add_requests(plain)
    plain.run(lambda turn: [])
    assert outputs_of(driver) == outputs_of(plain)
    assert runner_of(driver).tally.steps["whole"] > 10
