"""A layer's four linears together: cuBLAS against published times, INT4 and INT8 against cuBLAS."""

from dataclasses import fields, replace
from functools import partial

import torch
from bench import Bench, Gate
from sizes import LINEARS_US
from weights import linear_shapes, packed, random_quantised

from morphserve.runtime.kernels import Linear
from morphserve.runtime.kernels.cuda.kernels import CudaKernels

CACHE_BYTES = 160 << 20  # more than any L2: so much is read before a weight is read again
_UNITS = {0: "bf16", 4: "INT4", 8: "INT8"}


def run(bench: Bench) -> None:
    kernels = CudaKernels()
    shapes = linear_shapes(bench)
    spent_us: dict[tuple[int, int], float] = {}  # by (bits, rows), of all four
    for bits in (0, 4, 8):
        weights = {
            name: _copies(bench, _random(bench, kernels, *shape, bits))
            for name, shape in shapes.items()
        }
        for rows in bench.sizes.rows:
            if bench.left_s < 4:
                break
            spent_us[bits, rows] = sum(
                _one(bench, kernels, weights[name], rows, inputs, f"{_UNITS[bits]} {name}")
                for name, (_, inputs) in shapes.items()
            )
            _tell(bench, bits, rows, spent_us)
        del weights


def _tell(bench: Bench, bits: int, rows: int, spent_us: dict[tuple[int, int], float]) -> None:
    add, spent = bench.figures.add, spent_us[bits, rows]
    if not bits:
        published = LINEARS_US.get(rows)
        ratio = f"({spent / published:.2f} x vLLM)" if published else ""
        return add("bf16 layer us", f"M{rows}", f"{spent:.0f}", ratio)
    ratio_to_full = spent / spent_us[0, rows]
    limit = 0.5 if rows <= 32 else 1.0
    gate = Gate("<=", limit) if bits == 4 and rows <= 128 else None
    add(f"{_UNITS[bits]} over bf16", f"M{rows}", ratio_to_full, gate=gate)
    add(f"{_UNITS[bits]} layer us", f"M{rows}", spent, in_table=False)


def _one(
    bench: Bench,
    kernels: CudaKernels,
    copies: list[Linear],
    rows: int,
    inputs: int,
    line: str,
) -> float:
    """Microseconds of one linear, its weight read from memory."""
    x = bench.random(rows, inputs)
    works = [partial(kernels.linear, x, weight) for weight in copies]
    spent_us = bench.seconds(works, 0.02) * 1e6
    bench.figures.add(line, f"M{rows} us", spent_us, in_table=False)
    return spent_us


def _random(bench: Bench, kernels: CudaKernels, outputs: int, inputs: int, bits: int) -> Linear:
    if bits:
        return packed(bench, kernels, random_quantised(bench, outputs, inputs, bits))
    return kernels.pack_full(bench.random(outputs, inputs) * inputs**-0.5)


def _copies(bench: Bench, weight: Linear) -> list[Linear]:
    """The same in other places, until no cache holds them all."""
    tensors = {
        field.name: getattr(weight, field.name)
        for field in fields(weight)
        if isinstance(getattr(weight, field.name), torch.Tensor)
    }
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    count = 1 if bench.dry else min(32, max(2, -(-CACHE_BYTES // num_bytes)))
    return [
        replace(weight, **{name: tensor.clone() for name, tensor in tensors.items()})
        for _ in range(count)
    ]
