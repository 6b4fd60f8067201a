"""Random weights in the shapes of a decoder layer's linears, as the kernels want them."""

from dataclasses import replace

import torch
from bench import Bench
from torch import Tensor

from morphserve.quantize.weights import QuantizedWeight
from morphserve.runtime.kernels import Kernels, QuantizedLinear


def linear_shapes(bench: Bench) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear of a layer."""
    arch = bench.sizes.architecture
    return {
        "qkv": (arch.q_size + 2 * arch.kv_size, arch.hidden_size),
        "o": (arch.hidden_size, arch.q_size),
        "gate_up": (2 * arch.intermediate_size, arch.hidden_size),
        "down": (arch.hidden_size, arch.intermediate_size),
    }


def random_quantised(bench: Bench, outputs: int, inputs: int, bits: int) -> QuantizedWeight:
    """Scales like those of weights whose products keep their size."""
    groups = inputs // bench.sizes.group
    spread = inputs**-0.5 / (1.2 * 2 ** (bits - 2))
    scales = (torch.rand(outputs, groups, device=bench.device) + 0.5) * spread
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, device=bench.device)
    return QuantizedWeight(codes, scales.half(), bench.sizes.group, bits)


def packed(bench: Bench, kernels: Kernels, weight: QuantizedWeight) -> QuantizedLinear:
    """On the device; packing is the host's work."""
    host = replace(weight, codes=weight.codes.cpu(), scales=weight.scales.cpu())
    made = kernels.pack_quantized(host)
    tensors = ("codes", "scales", "zeros", "input_order")
    moved = {name: getattr(made, name) for name in tensors}
    return replace(made, **{name: t.to(bench.device) for name, t in moved.items() if t is not None})


def dequantised(weight: QuantizedWeight) -> Tensor:
    """float32 [N, K]."""
    groups = weight.codes.view(*weight.scales.shape, -1).float() - weight.middle
    return (groups * weight.scales.float().unsqueeze(-1)).flatten(1)
