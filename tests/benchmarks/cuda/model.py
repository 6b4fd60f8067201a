"""A model of random weights, whose layers all share one host image of each variant."""

from collections.abc import Iterable
from typing import Any

import torch
from bench import Bench
from torch import Tensor
from weights import linear_shapes, random_quantised

from morphserve.quantize.manifest import Variant
from morphserve.quantize.weights import Biases, LayerTensors, Norms, QuantizedWeight, StaticTensors
from morphserve.runtime.device import open_device
from morphserve.runtime.kernels import Kernels, load_kernels
from morphserve.runtime.ladder import Ladder, steps_of
from morphserve.runtime.layers import full_image, quantized_image
from morphserve.runtime.loader import LoadedModel
from morphserve.runtime.model import pack_statics


class SharedImages:
    """A device whose engines, one after the other, get the same images, which it pins once."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._pinned: dict[int, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def pin(self, images: Iterable[Tensor]) -> None:
        given = {image.data_ptr(): image for image in images}
        new = {place: image for place, image in given.items() if place not in self._pinned}
        if new:  # that nothing could not be pinned would say nothing
            self._pinned |= new
            self._device.pin(new.values())


def random_model(bench: Bench) -> LoadedModel:
    """Swaps go from full precision to INT4, front to back."""
    device, kernels = _device(bench)
    layers = bench.sizes.architecture.num_layers
    images = {
        Variant.FULL: [full_image(_full_layer(bench), kernels, torch.bfloat16)] * layers,
        Variant.INT4: [quantized_image(_int4_layer(bench), kernels, torch.bfloat16)] * layers,
    }
    return LoadedModel(
        architecture=bench.sizes.architecture,
        kernels=kernels,
        dtype=torch.bfloat16,
        statics=pack_statics(_statics(bench), kernels, torch.bfloat16),
        images=images,
        ladder=Ladder(steps_of(range(layers), [Variant.INT4]), layers),
        device=device,
    )


def _device(bench: Bench) -> tuple[Any, Kernels]:
    if bench.dry:
        from dry_gpu import KERNELS, DryGpu

        return DryGpu(), KERNELS
    return SharedImages(open_device("cuda")), load_kernels("cuda")


def _norms(bench: Bench) -> Norms:
    ones = torch.ones(bench.sizes.architecture.hidden_size)
    return Norms(ones, ones)


def _full_layer(bench: Bench) -> LayerTensors[Tensor]:
    weights = {
        name: (bench.random(*shape) * shape[1] ** -0.5).cpu()
        for name, shape in linear_shapes(bench).items()
    }
    return LayerTensors(_norms(bench), Biases(), **weights)


def _int4_layer(bench: Bench) -> LayerTensors[QuantizedWeight]:
    weights = {}
    for name, shape in linear_shapes(bench).items():
        made = random_quantised(bench, *shape, bits=4)
        weights[name] = QuantizedWeight(made.codes.cpu(), made.scales.cpu(), made.group_size)
    return LayerTensors(_norms(bench), Biases(), **weights)


def _statics(bench: Bench) -> StaticTensors:
    """Not tied, though both read the same numbers on the host."""
    arch = bench.sizes.architecture
    table = (bench.random(arch.vocab_size, arch.hidden_size) * arch.hidden_size**-0.5).cpu()
    return StaticTensors(table, torch.ones(arch.hidden_size), table[:])
