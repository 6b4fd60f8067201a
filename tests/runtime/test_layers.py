"""Images of every kind of variant give what the float32 forward pass over their weights gives."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from swap_driver import (
    ARCHITECTURE,
    BLOCK_TOKENS,
    KINDS,
    Driver,
    prompt_of,
    quantised_layers,
    random_model,
    tiny_model,
)
from torch import Tensor

from morphserve.quantize import dense
from morphserve.quantize.manifest import Variant
from morphserve.quantize.weights import LayerTensors
from morphserve.runtime.kernels import Kernels
from morphserve.runtime.kernels.cpu import CpuKernels
from morphserve.runtime.kernels.portable import TorchKernels
from morphserve.runtime.layers import quantized_image
from morphserve.runtime.request import Request, SamplingParams
from morphserve.runtime.runner import pack
from morphserve.runtime.scheduler import Slice

PROMPT = prompt_of(3, 29)


def dense_logits(layers: Sequence[LayerTensors[Tensor]]) -> Tensor:
    """[len(PROMPT), vocab] by the plain forward pass over whole sequences."""
    static, _ = random_model()
    tokens = torch.tensor([PROMPT])
    rotation = dense.rotation(ARCHITECTURE, len(PROMPT))
    x = dense.embed(static, tokens)
    for layer in layers:
        x = dense.decoder_layer(x, layer, ARCHITECTURE, rotation)
    return dense.logits(x, static, ARCHITECTURE)[0]


@torch.inference_mode()
def served_logits(driver: Driver) -> Tensor:
    """[len(PROMPT), vocab] of the layers as they are now."""
    request = Request("r", PROMPT, SamplingParams(max_tokens=1), arrival_s=0.0)
    request.blocks = driver.parts.pool.allocate(-(-len(PROMPT) // BLOCK_TOKENS))
    tokens, meta, _ = pack([Slice(request, 0, len(PROMPT))], BLOCK_TOKENS)
    logits = driver.parts.runner._model.forward(tokens, meta, torch.arange(len(PROMPT)))
    driver.parts.pool.free(request.blocks)
    return logits


def test_a_row_is_the_same_whichever_others_are_asked_for() -> None:
    parts = Driver(tiny_model(CpuKernels()), kv_tokens=200).parts
    batch = []
    for i, length in enumerate([9, 1, 17, 3]):
        request = Request(str(i), prompt_of(i, length), SamplingParams(max_tokens=1), 0.0)
        request.blocks = parts.pool.allocate(-(-length // BLOCK_TOKENS))
        batch.append(Slice(request, 0, length))
    tokens, meta, _ = pack(batch, BLOCK_TOKENS)
    every = parts.model.forward(tokens, meta, torch.arange(len(tokens)))
    for rows in ([8], [9], [0, 9, 10, 26], [27, 28, 29], []):
        asked = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(parts.model.forward(tokens, meta, asked), every[asked])


def demote(driver: Driver, layers: Sequence[int]) -> None:
    for layer in layers:
        driver.step([(layer, Variant.INT4)])
        driver.step()


def assert_agree(served: Tensor, dense: Tensor, kernels: Kernels) -> None:
    """The C kernels round activations to eight bits, some 0.7 % of a product, in each layer.

    Inputs in a wrong order, or another layer's weights, are off by more than the logits' size.
    """
    if isinstance(kernels, CpuKernels):
        assert (served - dense).norm() < 0.05 * dense.norm()
    else:
        torch.testing.assert_close(served, dense, rtol=1e-4, atol=2e-4)


def assert_serves_each_mix(kernels: Kernels) -> None:
    driver = Driver(tiny_model(kernels), kv_tokens=256)
    _, layers = random_model()
    for i, quantised in enumerate(quantised_layers()):
        layers[i] = dense.quantized_to_float32(quantised)
        before = served_logits(driver)
        demote(driver, [i])
        logits = served_logits(driver)
        assert_agree(logits, dense_logits(layers), kernels)
        assert not torch.equal(logits, before), f"layer {i} was not swapped"


def test_each_kind_of_layer_serves_the_weights_it_stands_for(kernels: Kernels) -> None:
    assert_serves_each_mix(kernels)


def test_so_it_does_without_a_compiler() -> None:
    assert_serves_each_mix(TorchKernels())


def test_the_tested_kinds_differ() -> None:
    assert len({grid for grid, _ in KINDS}) == len(KINDS)
    assert any(ordered for _, ordered in KINDS)


def test_a_variant_brings_its_own_norms(kernels: Kernels) -> None:
    quantised = quantised_layers()
    own = [
        replace(layer, norms=replace(layer.norms, input=layer.norms.input * 2))
        for layer in quantised
    ]
    model = tiny_model(kernels)
    images = [quantized_image(layer, kernels, torch.float32) for layer in own]
    driver = Driver(replace(model, images=model.images | {Variant.INT4: images}), kv_tokens=256)
    demote(driver, [1, 2])
    _, layers = random_model()
    for i in (1, 2):
        layers[i] = dense.quantized_to_float32(own[i])
    assert_agree(served_logits(driver), dense_logits(layers), kernels)


def test_only_qkv_o_and_gate_up_gather_their_inputs(kernels: Kernels) -> None:
    layer = next(layer for layer in quantised_layers() if layer.down.input_order is not None)
    names = quantized_image(layer, kernels, torch.float32).specs
    ordered = {name for name in names if name.endswith("input_order")}
    assert ordered == {"qkv.input_order", "o.input_order", "gate_up.input_order"}


def test_weights_that_are_not_in_use_can_be_run_from_staging(kernels: Kernels) -> None:
    driver = Driver(tiny_model(kernels), kv_tokens=256)
    layers = driver.parts.layers
    assert [len(views) for views in layers.views] == [3] * ARCHITECTURE.num_layers
    views = layers.views[2]
    assert views[0] is layers.active[2]
    staged = layers.stage(views[2])
    driver.parts.model.layers[2] = staged
    from_staging = served_logits(driver)
    driver.parts.model.layers[2] = views[0]
    demote(driver, [2])
    assert torch.equal(served_logits(driver), from_staging)
