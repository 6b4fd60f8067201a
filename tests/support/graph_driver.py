"""The step loop of `swap_driver` over a `CudaRunner`, with garbage where a step must not look."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from deferred_runner import Overlapping
from step_kernels import StepKernels
from swap_driver import ARCHITECTURE, BLOCK_TOKENS, Driver, tiny_model
from tape_graphs import TapeGpu
from torch import Tensor

from morphserve.quantize.manifest import Variant
from morphserve.runtime.arena import Arena
from morphserve.runtime.cuda.inputs import Limits
from morphserve.runtime.cuda.runner import CudaRunner, Launched, Sampler
from morphserve.runtime.kernels import LayerWeights
from morphserve.runtime.layers import weights_at
from morphserve.runtime.parts import Sampled
from morphserve.runtime.request import Request
from morphserve.runtime.scheduler import Batch

GARBAGE = 0x3FFFFFFF


@dataclass
class Drawn:
    tokens: Tensor

    def result(self) -> list[Sampled]:
        return [Sampled(None if token < 0 else token) for token in self.tokens.tolist()]


class GreedySampler:
    def launch(self, logits: Tensor, requests: Sequence[Request]) -> Drawn:
        assert len(logits) == len(requests)
        tokens = torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), -1).int()
        logits.fill_(float("nan"))
        return Drawn(tokens)


class Spoiling(Overlapping):
    """A runner in the shape that the driver wants, which spoils what is left of the last step."""

    def __init__(self, runner: CudaRunner) -> None:
        self.runner = runner

    def launch(self, batch: Batch) -> Launched:
        inputs = self.runner._inputs
        meta = inputs._meta
        fields = (meta.positions, meta.token_page, meta.token_slot, meta.query_start)
        for tensor in (*fields, meta.context_len, meta.block_table, inputs.tokens, inputs.rows):
            tensor.fill_(GARBAGE)
        return self.runner.launch(batch)


def graph_driver(
    gpu: TapeGpu,
    kv_tokens: int = 400,
    max_num_seqs: int = 12,
    warm: bool = True,
    kernels: Any = None,
    sampler: Sampler | None = None,
) -> Driver:
    """A driver with graphs, over the reference's operations unless told otherwise."""
    kernels = kernels or StepKernels()
    driver = Driver(tiny_model(kernels), kv_tokens, max_num_seqs=max_num_seqs)
    limits = Limits(max_tokens=24, max_seqs=max_num_seqs, max_blocks=-(-256 // BLOCK_TOKENS))
    runner = CudaRunner(gpu, kernels, driver.parts.model, sampler or GreedySampler(), limits)
    if warm:
        runner.warm_up(views_of(driver), staging(driver))
    driver.parts = replace(driver.parts, runner=Spoiling(runner))
    return driver


def views_of(driver: Driver) -> list[list[LayerWeights]]:
    by_variant = driver.parts.layers._views
    return [[of[i] for of in by_variant.values()] for i in range(ARCHITECTURE.num_layers)]


def staging(driver: Driver) -> Callable[[LayerWeights], LayerWeights]:
    """Puts a layer's image into memory of its own."""
    layers = driver.parts.layers
    images = {
        view: image
        for variant, views in layers._views.items()
        for view, image in zip(views, layers.images[variant], strict=True)
    }

    def stage(weights: LayerWeights) -> LayerWeights:
        return weights_at(_Bytes(images[weights].host.clone()), 0, images[weights])

    return stage


@dataclass
class _Bytes:
    bytes: Tensor

    span = Arena.span
    view = Arena.view


def runner_of(driver: Driver) -> CudaRunner:
    spoiling = driver.parts.runner
    assert isinstance(spoiling, Spoiling)
    return spoiling.runner


Script = Callable[[int], Sequence[tuple[int, Variant]]]
