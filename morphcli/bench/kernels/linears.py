"""Linear layers: bfloat16, INT4 and INT8, ours and torch's."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morphserve.morphcli.bench.kernels.memory import linear_bytes, rotated, rotated_linear
from morphserve.morphcli.bench.kernels.race import Call, Task, bell
from morphserve.morphcli.bench.kernels.result import Work
from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import Kernels, Linear

SHAPES = ((2048, 2048), (5632, 2048))  # outputs, inputs
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
GROUP = 128  # inputs that share a scale, INT4


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
    torch_int4: list[Tensor]
    torch_int8: list[Tensor]
    scales: dict[int, Tensor]  # by bits, as torch takes them


def linear_tasks(weights: Weights, kernels: Kernels) -> Iterator[list[Task]]:
    """The tasks of each number of rows."""
    for rows in ROWS:
        x = bell(rows, weights.inputs)
        own = x.to(kernels.activation_dtype(_dtype(kernels)))
        half = x.bfloat16()
        yield [
            _task("linear bf16", weights, rows, weights.full, kernels, own, _full(weights, half)),
            _task("linear INT4", weights, rows, weights.int4, kernels, own, _int4(weights, half)),
            _task("linear INT8", weights, rows, weights.int8, kernels, own, _int8(weights, half)),
        ]


def make_weights(outputs: int, inputs: int, kernels: Kernels) -> Weights:
    plain = bell(outputs, inputs, dtype=torch.bfloat16)
    int4 = random_codes(outputs, inputs, 4, GROUP, spread=1.0)
    int8 = random_codes(outputs, inputs, 8, inputs, spread=1.0)
    codes4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(int4.codes.int(), 1)
    scales4 = int4.scales.bfloat16().t().contiguous()  # [groups, N]
    return Weights(
        outputs,
        inputs,
        plain,
        full=rotated_linear(kernels.pack_full(plain.to(_dtype(kernels)))),
        int4=rotated_linear(kernels.pack_quantized(int4)),
        int8=rotated_linear(kernels.pack_quantized(int8)),
        torch_full=rotated(plain),
        torch_int4=rotated(codes4),
        torch_int8=rotated((int8.codes.int() - 128).to(torch.int8)),
        scales={
            4: torch.stack((scales4, torch.zeros_like(scales4)), dim=-1),
            8: int8.scales[:, 0].bfloat16(),
        },
    )


def random_codes(
    outputs: int, inputs: int, bits: int, group: int, spread: float
) -> QuantizedWeight:
    """A symmetric weight of evenly spread codes whose values have this standard deviation."""
    seed = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, generator=seed)
    scale = spread * 12**0.5 / (1 << bits)
    scales = torch.full((outputs, inputs // group), scale, dtype=torch.float16)
    return QuantizedWeight(codes, scales, group, bits)


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


def _int4(weights: Weights, x: Tensor) -> dict[str, Call]:
    codes, scales = weights.torch_int4, weights.scales[4]
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return {"int4pack_mm": lambda i: multiply(x, codes[i % len(codes)], GROUP, scales)}


def _int8(weights: Weights, x: Tensor) -> dict[str, Call]:
    codes, scales = weights.torch_int8, weights.scales[8]
    multiply = torch.ops.aten._weight_int8pack_mm
    return {"int8pack_mm": lambda i: multiply(x, codes[i % len(codes)], scales)}
