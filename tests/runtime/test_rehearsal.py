"""What is not in the arena is measured before the arena is laid out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from eager_device import EagerDevice
from graph_driver import GreedySampler
from step_kernels import StepKernels
from tape_graphs import TapeGpu

from morphserve.configs.errors import OutOfBudget
from morphserve.configs.load import load_policy
from morphserve.configs.schema import CacheConfig, EngineConfig, SchedulerConfig
from morphserve.runtime.build import build, layout_of
from morphserve.runtime.cuda.inputs import Limits
from morphserve.runtime.cuda.runner import CudaRunner
from morphserve.runtime.device.host import HostDevice
from morphserve.runtime.engine import Engine
from morphserve.runtime.layers import Layers
from morphserve.runtime.layout import DeviceMemory
from morphserve.runtime.loader import load_model
from morphserve.runtime.messages import Submit
from morphserve.runtime.model import Model
from morphserve.runtime.parts import Computed
from morphserve.runtime.request import SamplingParams
from morphserve.runtime.runner import Runner
from morphserve.runtime.scheduler import Batch
from morphserve.runtime.sizing import outline_model

MIB = 2**20


class Measuring(EagerDevice):
    """Runs what it is given to measure, and notes its steps."""

    def __init__(self, taken: int) -> None:
        super().__init__()
        self.taken = taken
        self.steps: list[tuple[int, int, int]] = []  # layers, tokens, requests
        self.beside: list[int] = []  # bytes that memory was asked for beside

    def measure(self, run: Callable[[], None]) -> int | None:
        run()
        return self.taken

    def memory(self, cache: CacheConfig, activation_bytes: int) -> DeviceMemory:
        self.beside.append(activation_bytes)
        most = 100 * MIB - activation_bytes
        return DeviceMemory(most, lambda: most, "it has", fills=True)

    def runner(self, model: Model, limits: SchedulerConfig, eos: Sequence[int]) -> Runner:
        device = self

        class Noting(Runner):
            def launch(self, batch: Batch) -> Computed:
                tokens = sum(piece.end - piece.start for piece in batch)
                device.steps.append((len(model.layers), tokens, len(batch)))
                return super().launch(batch)

        return Noting(model, eos)


@pytest.mark.parametrize("policy", ["off", "balanced"])
def test_the_largest_steps_run_through_one_layer_of_each_variant(policy: str, bundle: str) -> None:
    device = Measuring(7 * MIB)
    limits = SchedulerConfig(12, 100, 64)
    config = EngineConfig("demo", load_policy(policy), bundle, device="cpu", scheduler=limits)
    model = replace(load_model(config), device=device)
    parts = build(config, model)
    assert device.steps == [(1, 63, 1), (1, 100, 12)] * len(model.images)
    assert device.beside == [7 * MIB]
    memory = parts.hello.memory
    assert memory.activations == 7 * MIB
    assert 92 * MIB < memory.budget <= 93 * MIB, "all that is left"
    assert "measuring" in parts.hello.startup_s
    assert parts.pool.num_used == 0


def test_nothing_is_measured_where_nobody_needs_to_know() -> None:
    config = EngineConfig("demo", load_policy("off"), device="cpu")
    parts = build(config, load_model(config))
    assert parts.hello.memory.activations is None
    assert list(parts.hello.startup_s) == ["kernels", "checkpoint", "bundle", "arena"]


def test_a_model_that_does_not_fit_beside_its_activations_is_refused() -> None:
    config = EngineConfig("demo", load_policy("off"), device="cpu")
    model = replace(outline_model(config), device=Measuring(0))
    with pytest.raises(
        OutOfBudget, match=r"take \d+ MiB, more than it has \(4 MiB\): lower --max-mo"
    ):
        layout_of(config, model, 96 * MIB)


class Taped(EagerDevice):
    """Computes with the GPU's runner and graphs that are no graphs."""

    def measure(self, run: Callable[[], None]) -> int | None:
        run()
        return 0

    def runner(self, model: Model, limits: SchedulerConfig, eos: Sequence[int]) -> Any:
        blocks = -(-len(model.cos_sin) // model.shape.block_tokens)
        most = Limits(limits.max_num_batched_tokens, limits.max_num_seqs, blocks)
        return CudaRunner(TapeGpu(), model.kernels, model, GreedySampler(), most)

    def warm_up(self, runner: Any, layers: Layers) -> None:
        runner.warm_up(layers.views, layers.stage)


def test_the_graph_runner_is_rehearsed_warmed_up_and_served_with(bundle: str) -> None:
    limits = SchedulerConfig(2, 16, 64)
    policy, kernels = load_policy("balanced"), StepKernels()
    config = EngineConfig(
        "demo", policy, bundle, device="cpu", kernels="reference", scheduler=limits
    )
    outputs = []
    for device in (HostDevice(), Taped()):
        model = replace(load_model(config), device=device, kernels=kernels)
        engine = Engine(config, build(config, model))
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        engine.submit(Submit("r", [5, 6, 7], params))
        tokens: list[int] = []
        while engine.has_work:
            step = engine.step()
            tokens += [t for output in (step.outputs if step else []) for t in output.tokens]
        outputs.append(tokens)
    assert len(outputs[0]) == 6
    assert outputs[0] == outputs[1]
