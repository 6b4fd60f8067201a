"""Linear layers: bfloat16, INT4 and INT8, ours and torch's."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morphserve.morphcli.bench.kernels.memory import (
    copies_beyond_caches,
    linear_bytes,
    linears_beyond_caches,
)
from morphserve.morphcli.bench.kernels.race import Call, Task
from morphserve.morphcli.bench.kernels.random_values import bell, random_codes
from morphserve.morphcli.bench.kernels.result import Work
from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import Kernels, Linear

SHAPES = ((2048, 2048), (5632, 2048))  # outputs, inputs
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
GROUP = 128  # inputs that share a scale, INT4

Multiply = Callable[[Tensor, int], Tensor]  # bfloat16 activations, with the weight's i-th copy


@dataclass(frozen=True, slots=True)
class Weights:
    """One weight in every form, each so many times over that caches do not hold it."""

    outputs: int
    inputs: int
    plain: Tensor  # bfloat16 [N, K]
    full: list[Linear]
    int4: list[Linear]
    int8: list[Linear]
    torch_full: list[Tensor]
    torch_int4: Multiply | None  # None: not with this torch
    torch_int8: Multiply | None


def linear_tasks(weights: Weights, kernels: Kernels) -> Iterator[list[Task]]:
    """The tasks of each number of rows."""
    for rows in ROWS:
        x = bell(rows, weights.inputs, seed=0)
        own = x.to(kernels.activation_dtype(_dtype(kernels)))
        half = x.bfloat16()
        full = _full(weights, half)
        int4 = _quantized("int4pack_mm", weights.torch_int4, half)
        int8 = _quantized("int8pack_mm", weights.torch_int8, half)
        yield [
            _task("linear bf16", weights, rows, weights.full, kernels, own, full),
            _task("linear INT4", weights, rows, weights.int4, kernels, own, int4),
            _task("linear INT8", weights, rows, weights.int8, kernels, own, int8),
        ]


def make_weights(outputs: int, inputs: int, kernels: Kernels) -> Weights:
    plain = bell(outputs, inputs, seed=1, dtype=torch.bfloat16)
    int4 = random_codes(outputs, inputs, 4, GROUP, spread=1.0)
    int8 = random_codes(outputs, inputs, 8, inputs, spread=1.0)
    return Weights(
        outputs,
        inputs,
        plain,
        full=linears_beyond_caches(kernels.pack_full(plain.to(_dtype(kernels)))),
        int4=linears_beyond_caches(kernels.pack_quantized(int4)),
        int8=linears_beyond_caches(kernels.pack_quantized(int8)),
        torch_full=copies_beyond_caches(plain),
        torch_int4=_if_it_works(_torch_int4, int4),
        torch_int8=_if_it_works(_torch_int8, int8),
    )


def _dtype(kernels: Kernels) -> torch.dtype:
    return kernels.weight_dtype(torch.bfloat16)


def _task(
    name: str,
    weights: Weights,
    rows: int,
    ours: list[Linear],
    kernels: Kernels,
    x: Tensor,
    rivals: Mapping[str, Call],
) -> Task:
    products = rows * weights.outputs * weights.inputs
    kind = "bfloat16" if name == "linear bf16" else "int8"
    return Task(
        kernel=name,
        size=f"{weights.outputs}x{weights.inputs}",
        rows=rows,
        work=Work(linear_bytes(ours[0]), products, kind),
        ours=lambda i: kernels.linear(x, ours[i % len(ours)]),
        torch=rivals,
    )


def _full(weights: Weights, x: Tensor) -> dict[str, Call]:
    plain = weights.torch_full
    routes: dict[str, Call] = {"F.linear": lambda i: F.linear(x, plain[i % len(plain)])}
    if pack := _onednn(len(x)):
        first = pack(weights.plain)
        packed = [first, *(first.clone() for _ in plain[1:])]
        multiply = torch.ops.mkldnn._linear_pointwise
        routes["oneDNN, packed"] = lambda i: multiply(
            x, packed[i % len(packed)], None, "none", [], ""
        )
    return routes


def _onednn(rows: int) -> Callable[[Tensor], Tensor] | None:
    """Packs a weight for batches of so many rows; None where torch cannot."""
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_reorder_linear_weight") or not ops._is_mkldnn_bf16_supported():
        return None
    return lambda weight: ops._reorder_linear_weight(weight, rows)


def _quantized(name: str, multiply: Multiply | None, x: Tensor) -> dict[str, Call]:
    return {} if multiply is None else {name: lambda i: multiply(x, i)}


def _if_it_works(
    prepare: Callable[[QuantizedWeight], Multiply], weight: QuantizedWeight
) -> Multiply | None:
    """Torch's operations on codes are private: one version has them, another not, or otherwise."""
    try:
        multiply = prepare(weight)
        multiply(torch.zeros(1, weight.codes.shape[1], dtype=torch.bfloat16), 0)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return multiply


def _torch_int4(weight: QuantizedWeight) -> Multiply:
    ops = torch.ops.aten
    codes = copies_beyond_caches(ops._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1))
    scales = weight.scales.bfloat16().t().contiguous()  # [groups, N]
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1)
    multiply, group = ops._weight_int4pack_mm_for_cpu, weight.group_size
    return lambda x, i: multiply(x, codes[i % len(codes)], group, scales_and_zeros)


def _torch_int8(weight: QuantizedWeight) -> Multiply:
    codes = copies_beyond_caches((weight.codes.int() - 128).to(torch.int8))
    scales = weight.scales[:, 0].bfloat16()
    multiply = torch.ops.aten._weight_int8pack_mm
    return lambda x, i: multiply(x, codes[i % len(codes)], scales)
