"""The CUDA kernels under the step runner, in graphs: the tokens of the reference."""

import emulated_codes  # noqa: F401
import pytest
import torch
from graph_driver import graph_driver, runner_of, views_of
from swap_driver import Driver, prompt_of, tiny_model
from tape_graphs import TapeGpu

from morphserve.quantize.manifest import Variant
from morphserve.runtime.cuda.sampler import DeviceSampler
from morphserve.runtime.kernels.cuda.kernels import CudaKernels
from morphserve.runtime.kernels.cuda.scratch import scratch_of
from morphserve.runtime.kernels.reference import ReferenceKernels
from morphserve.runtime.request import SamplingParams


def outputs(driver: Driver) -> list[list[int]]:
    driver.add("a", prompt_of(1, 9), max_tokens=5)
    drawn = driver.add("b", prompt_of(2, 4), max_tokens=3)
    drawn.params = SamplingParams(3, temperature=0.8, top_p=0.9, seed=5)
    swaps = {2: [(1, Variant.INT4)]}
    driver.run(lambda turn: swaps.get(turn, []))
    return [request.output for request in driver.requests.values()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
# What a padded sequence attends to is nothing; what comes of that is thrown away.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_graphs_of_the_cuda_kernels_give_the_tokens_of_the_reference() -> None:
    scratch_of(torch.device("cpu"))  # before the first capture, as a rehearsal sees to
    driver = graph_driver(
        TapeGpu(rehearses=False),
        200,
        2,
        warm=False,
        kernels=CudaKernels(),
        sampler=DeviceSampler(()),
    )
    graphs = runner_of(driver)._graphs
    graphs.capture_first()
    graphs.capture_pieces(views_of(driver))
    assert outputs(driver) == outputs(Driver(tiny_model(ReferenceKernels()), 200, max_num_seqs=2))
    steps = runner_of(driver).tally.steps
    assert steps["whole"] and steps["pieces"] and steps["eager"]
