"""Layer images: one run of bytes per layer and variant, and which one each layer uses now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from morphserve.quantize.manifest import Variant
from morphserve.quantize.weights import LayerTensors, QuantizedWeight
from morphserve.runtime.arena import Arena
from morphserve.runtime.device.pinning import PAGE_BYTES
from morphserve.runtime.kernels import (
    FullLinear,
    Kernels,
    LayerWeights,
    Linear,
    QKNorm,
    QuantizedLinear,
)
from morphserve.runtime.memory import MemoryPlan, align

LINEARS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    offset: int  # bytes from the image's start
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Image:
    """A layer's tensors in the kernels' layout, packed into host memory."""

    specs: Mapping[str, TensorSpec]
    num_outputs: Mapping[str, int]  # of each linear
    bits: int  # of quantised linears; 0 at full precision
    host: Tensor  # uint8 [num_bytes]

    @property
    def num_bytes(self) -> int:
        return self.host.numel()


def full_image(layer: LayerTensors[Tensor], kernels: Kernels, dtype: torch.dtype) -> Image:
    """The full-precision image, weights in `dtype`."""
    tensors = _norms_and_biases(layer, kernels.activation_dtype(dtype))
    num_outputs = {}
    for name in LINEARS:
        packed = kernels.pack_full(getattr(layer, name).to(dtype))
        tensors[f"{name}.weight"] = packed.weight
        num_outputs[name] = packed.num_outputs
    return _pack(tensors, num_outputs, bits=0)


def quantized_image(
    layer: LayerTensors[QuantizedWeight], kernels: Kernels, dtype: torch.dtype
) -> Image:
    """The image of a quantised variant; `dtype` is that of the full-precision weights beside it."""
    layer = _with_down_in_order(layer)
    tensors = _norms_and_biases(layer, kernels.activation_dtype(dtype))
    num_outputs = {}
    for name in LINEARS:
        packed = kernels.pack_quantized(getattr(layer, name))
        parts = {
            part: getattr(packed, part) for part in ("codes", "scales", "zeros", "input_order")
        }
        tensors |= {f"{name}.{part}": t for part, t in parts.items() if t is not None}
        num_outputs[name] = packed.num_outputs
    return _pack(tensors, num_outputs, layer.qkv.bits)


def _with_down_in_order(layer: LayerTensors[QuantizedWeight]) -> LayerTensors[QuantizedWeight]:
    """The same layer, with gate's and up's outputs in the order of `down`'s columns."""
    order = layer.down.input_order
    if order is None:
        return layer
    rows = torch.cat((order, order + len(order)))
    weight, bias = layer.gate_up, layer.biases.gate_up
    gate_up = replace(
        weight,
        codes=weight.codes[rows],
        scales=weight.scales[rows],
        zeros=None if weight.zeros is None else weight.zeros[rows],
    )
    biases = replace(layer.biases, gate_up=None if bias is None else bias[rows])
    down = replace(layer.down, input_order=None)
    return replace(layer, biases=biases, gate_up=gate_up, down=down)


def _norms_and_biases(
    layer: LayerTensors[Tensor] | LayerTensors[QuantizedWeight], dtype: torch.dtype
) -> dict[str, Tensor]:
    norms, biases = layer.norms, layer.biases
    named = {
        "norm.input": norms.input,
        "norm.post": norms.post_attention,
        "norm.q": norms.q,
        "norm.k": norms.k,
        "qkv.bias": biases.qkv,
        "o.bias": biases.o,
        "gate_up.bias": biases.gate_up,
        "down.bias": biases.down,
    }
    return {name: tensor.to(dtype) for name, tensor in named.items() if tensor is not None}


def _pack(tensors: Mapping[str, Tensor], num_outputs: Mapping[str, int], bits: int) -> Image:
    specs, end = {}, 0
    for name, tensor in tensors.items():
        specs[name] = TensorSpec(end, tuple(tensor.shape), tensor.dtype)
        end = align(end + tensor.numel() * tensor.element_size())
    host = _whole_pages(end)
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        host[specs[name].offset : specs[name].offset + raw.numel()] = raw
    return Image(specs, num_outputs, bits, host)


def _whole_pages(num_bytes: int) -> Tensor:
    """Zeros in pages of their own, so that these can be locked for a device to read."""
    memory = torch.zeros(align(num_bytes, PAGE_BYTES) + PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE_BYTES
    return memory[start : start + num_bytes]


def weights_at(arena: Arena, offset: int, image: Image) -> LayerWeights:
    """Views of an image that lies at a byte offset of the arena."""
    tensors = {
        name: arena.view(offset + spec.offset, spec.shape, spec.dtype)
        for name, spec in image.specs.items()
    }

    def linear(name: str) -> Linear:
        bias, num_outputs = tensors.get(f"{name}.bias"), image.num_outputs[name]
        if not image.bits:
            return FullLinear(tensors[f"{name}.weight"], bias, num_outputs)
        return QuantizedLinear(
            bits=image.bits,
            codes=tensors[f"{name}.codes"],
            scales=tensors[f"{name}.scales"],
            zeros=tensors.get(f"{name}.zeros"),
            input_order=tensors.get(f"{name}.input_order"),
            bias=bias,
            num_outputs=num_outputs,
        )

    qk_norm = QKNorm(tensors["norm.q"], tensors["norm.k"]) if "norm.q" in tensors else None
    return LayerWeights(
        input_norm=tensors["norm.input"],
        post_norm=tensors["norm.post"],
        qk_norm=qk_norm,
        **{name: linear(name) for name in LINEARS},
    )


class Layers:
    """Host images of every layer, their views in the arena, and the active variant of each."""

    def __init__(
        self,
        arena: Arena,
        plan: MemoryPlan,
        images: Mapping[Variant, Sequence[Image]],
        variants: Sequence[Variant],
    ) -> None:
        """Places the image of each layer's variant in the arena."""
        # Host images are kept only where layers will be swapped: they are as large as the model.
        self.images = images if plan.staging else {}
        self.variants = list(variants)
        self._arena, self._plan = arena, plan
        self._views = {
            variant: [
                weights_at(arena, slab.offsets[variant], image)
                for slab, image in zip(plan.slabs, of_layers, strict=True)
            ]
            for variant, of_layers in images.items()
        }
        self.active = [self._views[variant][i] for i, variant in enumerate(variants)]
        for i, variant in enumerate(variants):
            image = images[variant][i]
            arena.span(plan.slabs[i].offsets[variant], image.num_bytes).copy_(image.host)

    @property
    def views(self) -> list[list[LayerWeights]]:
        """Of each layer, its weights in each variant that it may come to have."""
        if not self._plan.staging:
            return [[weights] for weights in self.active]
        return [list(of_layer) for of_layer in zip(*self._views.values(), strict=True)]

    def stage(self, weights: LayerWeights) -> LayerWeights:
        """One of `views` elsewhere, with its content: in staging, until a swap goes there.

        For what has to be run once before it serves. Not for layers of full precision.
        """
        variant, layer = next(
            (variant, i)
            for variant, of_layers in self._views.items()
            for i, view in enumerate(of_layers)
            if view is weights
        )
        image, slot = self.images[variant][layer], self._plan.staging[0]
        assert image.num_bytes <= self._plan.sizes.staged_bytes
        self._arena.span(slot, image.num_bytes).copy_(image.host)
        return weights_at(self._arena, slot, image)

    def activate(self, layer: int, variant: Variant) -> None:
        """From the next forward pass on, the layer uses this variant."""
        self.variants[layer] = variant
        self.active[layer] = self._views[variant][layer]
