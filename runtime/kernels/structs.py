"""The C structures of linear.h and forward.c, filled from tensors."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from morphserve.runtime.kernels import (
    AttentionShape,
    BatchMeta,
    FullLinear,
    LayerWeights,
    Linear,
)

KIND = {torch.float32: 0, torch.bfloat16: 1}
_INT4, _INT8 = 2, 3

_ptr, _i64 = ctypes.c_void_p, ctypes.c_int64


class LinearStruct(ctypes.Structure):
    _fields_ = [
        *(("kind", _i64), ("data", _ptr), ("scales", _ptr), ("zeros", _ptr)),
        *(("order", _ptr), ("bias", _ptr), ("n", _i64), ("k", _i64), ("groups", _i64)),
    ]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *((name, LinearStruct) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _ptr) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
    ]


class ShapeStruct(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("kind", "heads", "kv_heads", "dim", "block_tokens")),
        ("eps", ctypes.c_float),
    ]


class StackStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.POINTER(_ptr)) for name in ("layers", "caches")),
        *(("num_layers", _i64), ("shape", ShapeStruct)),
    ]


class BatchStruct(ctypes.Structure):
    _fields_ = [
        *((name, _i64) for name in ("tokens", "sequences", "max_blocks")),
        *((name, _ptr) for name in ("positions", "token_page", "token_slot")),
        *((name, _ptr) for name in ("query_start", "context_len", "block_table")),
    ]


def data_of(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def optional(tensor: Tensor | None) -> int | None:
    return None if tensor is None else data_of(tensor)


def linear_struct(weight: Linear, num_inputs: int) -> LinearStruct:
    """`num_inputs` is K: packed weights may have more."""
    if isinstance(weight, FullLinear):
        data, kind = weight.weight, KIND[weight.weight.dtype]
        return LinearStruct(
            *(kind, data_of(data), None, None, None, optional(weight.bias)),
            *(weight.num_outputs, num_inputs, 0),
        )
    return LinearStruct(
        *(_INT4 if weight.bits == 4 else _INT8, data_of(weight.codes), data_of(weight.scales)),
        *(optional(weight.zeros), optional(weight.input_order), optional(weight.bias)),
        *(weight.num_outputs, num_inputs, weight.scales.shape[1]),
    )


def shape_struct(shape: AttentionShape, dtype: torch.dtype) -> ShapeStruct:
    return ShapeStruct(
        *(KIND[dtype], shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_tokens),
        shape.norm_eps,
    )


def stack_struct(
    layers: Sequence[LayerStruct], caches: Sequence[Tensor], shape: AttentionShape
) -> StackStruct:
    """The layers must outlive it."""
    assert len(layers) == len(caches)
    pointers = _ptr * len(layers)
    kind = caches[0].dtype if caches else torch.float32
    return StackStruct(
        *(pointers(*map(ctypes.addressof, layers)), pointers(*map(data_of, caches))),
        *(len(layers), shape_struct(shape, kind)),
    )


def batch_struct(meta: BatchMeta) -> BatchStruct:
    return BatchStruct(
        *(len(meta.positions), *meta.block_table.shape),
        *map(data_of, (meta.positions, meta.token_page, meta.token_slot)),
        *map(data_of, (meta.query_start, meta.context_len, meta.block_table)),
    )


def layer_struct(layer: LayerWeights, hidden: int, shape: AttentionShape) -> LayerStruct:
    norm = layer.qk_norm
    return LayerStruct(
        linear_struct(layer.qkv, hidden),
        linear_struct(layer.o, shape.num_heads * shape.head_dim),
        linear_struct(layer.gate_up, hidden),
        linear_struct(layer.down, layer.gate_up.num_outputs // 2),
        *(data_of(layer.input_norm), data_of(layer.post_norm)),
        *((data_of(norm.q), data_of(norm.k)) if norm else (None, None)),
    )
