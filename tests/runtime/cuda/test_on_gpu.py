"""What only a GPU can show: real captures, and steps that overlap."""

import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from typing import Any

import emulated_codes  # noqa: F401
import pytest
import torch
from graph_driver import GreedySampler
from swap_driver import Driver, prompt_of, tiny_model
from tape_graphs import TapeGpu
from torch import Tensor

from morphserve.quantize.manifest import Variant
from morphserve.runtime.cuda.gpu import CudaGpu, Gpu
from morphserve.runtime.cuda.inputs import Limits
from morphserve.runtime.cuda.runner import CudaRunner
from morphserve.runtime.kernels.cuda.kernels import CudaKernels
from morphserve.runtime.parts import Launched
from morphserve.runtime.request import Status
from morphserve.runtime.scheduler import Batch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

LIMITS = Limits(max_tokens=24, max_seqs=4, max_blocks=32)


def gpu_here() -> Gpu:
    return CudaGpu() if torch.cuda.is_available() else TapeGpu(rehearses=False)


def moved(value: Any, device: torch.device) -> Any:
    """The same with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: moved(getattr(value, f.name), device) for f in fields(value)}
        return replace(value, **parts)
    return [moved(part, device) for part in value] if isinstance(value, list) else value


class OnGpu:
    """Requests over a runner, each layer of which may be given its other weights at any time."""

    def __init__(self, gpu: Gpu) -> None:
        self.driver = Driver(tiny_model(CudaKernels()), 300, max_num_seqs=LIMITS.max_seqs)
        model, kernels = self.driver.parts.model, CudaKernels()
        images = self.driver.model.images
        self.weights = {
            variant: [self._placed(image, gpu.device) for image in images[variant]]
            for variant in (Variant.FULL, Variant.INT4)
        }
        self.active = list(self.weights[Variant.FULL])
        model = replace(
            model,
            static=moved(model.static, gpu.device),
            layers=self.active,
            caches=[torch.zeros_like(cache, device=gpu.device) for cache in model.caches],
            cos_sin=model.cos_sin.to(gpu.device),
        )
        self.runner = CudaRunner(gpu, kernels, model, GreedySampler(), LIMITS)

    @staticmethod
    def _placed(image: Any, device: torch.device) -> Any:
        from graph_driver import _Bytes

        from morphserve.runtime.layers import weights_at

        return weights_at(_Bytes(image.host.to(device)), 0, image)

    def warm_up(self) -> None:
        views = [list(of_layer) for of_layer in zip(*self.weights.values(), strict=True)]
        self.runner.warm_up(views, stage=lambda weights: weights)

    def run(self, swaps: dict[int, tuple[int, Variant]]) -> list[list[int]]:
        scheduler = self.driver.parts.scheduler
        for i, length in enumerate((5, 9, 14)):
            self.driver.add(str(i), prompt_of(i, length), max_tokens=6 + 3 * i)
        ahead: list[tuple[Batch, Launched]] = []
        for turn in range(24):
            if turn in swaps:
                layer, variant = swaps[turn]
                self.active[layer] = self.weights[variant][layer]
            batch = scheduler.schedule()
            launched = self.runner.launch(batch) if batch else None
            for before, step in ahead:
                scheduler.computed(before, [got.token for got in step.result()])
            ahead.clear()
            if launched is not None:
                scheduler.launched(batch)
                ahead.append((batch, launched))
        assert all(r.status is Status.FINISHED for r in self.driver.requests.values())
        return [request.output for request in self.driver.requests.values()]


SWAPS = {
    5: (1, Variant.INT4),
    8: (3, Variant.INT4),
    11: (1, Variant.FULL),
    14: (3, Variant.FULL),
}


def test_graphs_and_launches_one_by_one_give_the_same_tokens() -> None:
    gpu = gpu_here()
    launched, captured = OnGpu(gpu), OnGpu(gpu)
    captured.warm_up()
    assert not captured.runner.tally.failure
    assert captured.run(SWAPS) == launched.run(SWAPS)
    steps = captured.runner.tally.steps
    assert steps["whole"] and steps["pieces"] and steps["eager"]
    assert launched.runner.tally.steps["eager"] == steps.total()


WAITS_IN_A_CAPTURE = """
import torch
from morphserve.runtime.cuda.gpu import CudaGpu
gpu = CudaGpu()
result = torch.zeros(1, device=gpu.device)
replay = gpu.capture(lambda: result.add_(1))
try:
    gpu.capture(result.item)
except RuntimeError as error:
    print("failed:", error)
replay()
(result + torch.ones(1000, 1000, device=gpu.device)).sum().item()
assert result.item() == 1 and not gpu.is_lost()
"""


def test_a_capture_that_waits_fails_and_spares_the_rest() -> None:
    script = [sys.executable, "-c", WAITS_IN_A_CAPTURE]  # the allocator of this process stays sound
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert done.stdout.startswith("failed:")
