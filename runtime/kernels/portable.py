"""Kernels for CPUs without a compiler: torch, where it is faster than the reference."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from morphserve.runtime.kernels import FullLinear, Linear
from morphserve.runtime.kernels.reference import ReferenceKernels, dequantise, in_column_order


class TorchKernels(ReferenceKernels):
    """What runs without a compiler: float32 throughout, which torch does well on any CPU."""

    name = "torch"

    def weight_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def activation_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        if isinstance(weight, FullLinear):
            return super().linear(x, weight)
        x, zeros = in_column_order(x, weight), weight.zeros
        pieces = []
        for start in range(0, len(weight.codes), 256):  # rows whose floats stay in the cache
            rows = slice(start, start + 256)
            part = dataclasses.replace(
                weight,
                codes=weight.codes[rows],
                scales=weight.scales[rows],
                zeros=None if zeros is None else zeros[rows],
            )
            pieces.append(F.linear(x, dequantise(part)))
        out = torch.cat(pieces, dim=1)
        return out if weight.bias is None else out.add_(weight.bias)
