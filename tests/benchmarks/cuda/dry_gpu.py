"""A GPU that is none: everything runs at once, on the CPU, and graphs are tapes."""

from collections.abc import Sequence
from typing import Any

from eager_device import EagerDevice
from graph_driver import GreedySampler
from step_kernels import StepKernels
from tape_graphs import TapeGpu

from morphserve.configs.schema import SchedulerConfig
from morphserve.runtime.cuda.inputs import Limits
from morphserve.runtime.cuda.runner import CudaRunner
from morphserve.runtime.layers import Layers
from morphserve.runtime.model import Model

KERNELS = StepKernels()


class DryGpu(EagerDevice):
    """With the runner, the swaps and the graphs of a GPU."""

    def runner(
        self, model: Model, limits: SchedulerConfig, eos_token_ids: Sequence[int]
    ) -> CudaRunner:
        longest = len(model.cos_sin)
        sizes = Limits(
            max_tokens=limits.max_num_batched_tokens,
            max_seqs=limits.max_num_seqs,
            max_blocks=-(-longest // model.shape.block_tokens),
        )
        kernels: Any = model.kernels
        return CudaRunner(TapeGpu(), kernels, model, GreedySampler(), sizes)

    def warm_up(self, runner: Any, layers: Layers) -> None:
        runner.warm_up(layers.views, layers.stage)
