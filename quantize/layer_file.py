"""The file of a layer's variant: its name, its size, writing it, and reading it strictly."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from morphserve.quantize import modules
from morphserve.quantize.architecture import Architecture
from morphserve.quantize.checkpoint import read_biases, read_norms
from morphserve.quantize.files import BadFile, encode_tensors, file_bytes, parse_tensors
from morphserve.quantize.manifest import Quantization, Variant
from morphserve.quantize.packing import fuse, pack, split, unpack
from morphserve.quantize.weights import LayerTensors, QuantizedWeight

_PACKED = {
    "qweight": torch.int32,
    "scales": torch.float16,
    "qzeros": torch.int32,
    "g_idx": torch.int32,
}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of tensors by name


def layer_file_name(layer: int, variant: Variant) -> str:
    return f"layer-{layer:05d}.{variant}.safetensors"


def encode_layer(layer: LayerTensors[QuantizedWeight], arch: Architecture) -> bytes:
    """The content of the file of a layer's variant: linears unfused, packed."""
    return encode_tensors(named_tensors(layer, arch))


def layer_file_bytes(arch: Architecture, how: Quantization, vectors: torch.dtype) -> int:
    """Size of a layer's file if its inputs are in order and its norms and biases of this dtype."""
    layout = _packed_layout(arch, how)
    for name, shape in modules.vector_shapes(arch).items():
        layout[name] = vectors, shape
    return file_bytes(layout)


def decode_layer(
    path: Path, data: bytes, arch: Architecture, how: Quantization
) -> LayerTensors[QuantizedWeight]:
    """The layer in a file's content, q, k, v and gate, up fused.

    Raises BadFile, naming `path` and the tensor, unless it holds exactly a layer's tensors.
    """
    tensors = parse_tensors(path, data)
    _check_layout(path, tensors, arch, how)
    _check_values(path, tensors)

    def linear(names: tuple[str, ...]) -> QuantizedWeight:
        orders = [tensors.get(f"{name}.g_idx") for name in names]
        if any((a is None) != (b is None) for a, b in zip(orders, orders[1:], strict=False)):
            raise BadFile(f"{names[0]} in {path} has another order of inputs than {names[-1]}")
        parts = [unpack(_of(tensors, name), how.bits) for name in names]
        if any(not _same_order(parts[0], part) for part in parts):
            raise BadFile(f"{names[0]} in {path} has another order of inputs than {names[-1]}")
        return fuse(parts)

    return LayerTensors(
        norms=read_norms(tensors),
        biases=read_biases(tensors),
        qkv=linear(modules.QKV),
        o=linear(modules.OUTPUT),
        gate_up=linear(modules.GATE_UP),
        down=linear(modules.DOWN),
    )


def _of(tensors: Mapping[str, Tensor], linear: str) -> dict[str, Tensor]:
    return {end: tensors[f"{linear}.{end}"] for end in _PACKED if f"{linear}.{end}" in tensors}


def _packed_layout(arch: Architecture, how: Quantization) -> Layout:
    per_word = 32 // how.bits
    layout: Layout = {}
    for name, (outputs, inputs) in modules.linear_shapes(arch).items():
        groups = inputs // (how.group_size or inputs)
        layout[f"{name}.qweight"] = torch.int32, (inputs // per_word, outputs)
        layout[f"{name}.scales"] = torch.float16, (groups, outputs)
        if not how.symmetric:
            layout[f"{name}.qzeros"] = torch.int32, (groups, outputs // per_word)
    return layout


def _check_layout(
    path: Path, tensors: Mapping[str, Tensor], arch: Architecture, how: Quantization
) -> None:
    expected = _packed_layout(arch, how)
    for name, (_, inputs) in modules.linear_shapes(arch).items():
        if f"{name}.g_idx" in tensors:
            expected[f"{name}.g_idx"] = torch.int32, (inputs,)
    for name, size in modules.vector_shapes(arch).items():
        dtype = tensors[name].dtype if name in tensors else torch.float32
        expected[name] = (dtype if dtype in _FLOATS else torch.float32), size
    for name in sorted(expected.keys() - tensors.keys()):
        raise BadFile(f"{path} lacks tensor {name}")
    for name in sorted(tensors.keys() - expected.keys()):
        raise BadFile(f"{path} holds tensor {name}, which a {arch.family} layer does not have")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype:
            raise BadFile(f"{name} in {path} is {_name(found.dtype)}, not {_name(dtype)}")
        if tuple(found.shape) != shape:
            raise BadFile(f"{name} in {path} has shape {list(found.shape)}, not {list(shape)}")


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadFile(f"{name} in {path} has values that are not finite")
        if name.endswith(".g_idx"):
            linear = name.removesuffix(".g_idx")
            _check_groups(path, name, tensor, tensors[f"{linear}.scales"].shape[0])


def _check_groups(path: Path, name: str, group_of: Tensor, groups: int) -> None:
    if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise BadFile(f"{name} in {path} names groups beyond the {groups} there are")
    if len(set(torch.bincount(group_of, minlength=groups).tolist())) != 1:
        raise BadFile(f"{name} in {path} does not put as many inputs into each group")


def _same_order(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    if a.input_order is None or b.input_order is None:
        return a.input_order is b.input_order
    return torch.equal(a.input_order, b.input_order)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def named_tensors(layer: LayerTensors[QuantizedWeight], arch: Architecture) -> dict[str, Tensor]:
    """Norms, biases and packed linears of a layer, unfused, by their names within it."""
    named: dict[str, Tensor | None] = {
        modules.INPUT_NORM: layer.norms.input,
        modules.POST_ATTENTION_NORM: layer.norms.post_attention,
        modules.Q_NORM: layer.norms.q,
        modules.K_NORM: layer.norms.k,
    }
    biases = layer.biases
    for names, weight, bias in (
        (modules.QKV, layer.qkv, biases.qkv),
        (modules.OUTPUT, layer.o, biases.o),
        (modules.GATE_UP, layer.gate_up, biases.gate_up),
        (modules.DOWN, layer.down, biases.down),
    ):
        sizes = [modules.linear_shapes(arch)[name][0] for name in names]
        for name, part in zip(names, split(weight, sizes), strict=True):
            named |= {f"{name}.{end}": tensor for end, tensor in pack(part).items()}
        if bias is not None:
            parts = torch.split(bias, sizes)
            named |= {f"{name}.bias": part for name, part in zip(names, parts, strict=True)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
