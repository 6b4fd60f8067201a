"""Random numbers and codes, the same in every run."""

import torch
from torch import Tensor

from morphserve.quantize.weights import QuantizedWeight


def bell(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed numbers: what meets in one product is drawn with unlike seeds."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_codes(
    outputs: int, inputs: int, bits: int, group: int, spread: float
) -> QuantizedWeight:
    """A symmetric weight of evenly spread codes whose values have this standard deviation."""
    seed = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, generator=seed)
    scale = spread * 12**0.5 / (1 << bits)
    scales = torch.full((outputs, inputs // group), scale, dtype=torch.float16)
    return QuantizedWeight(codes, scales, group, bits)
