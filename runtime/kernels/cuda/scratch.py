"""Memory that linears share, at one address per device as long as the process lives.

They run one after the other on one stream, so none finds another's numbers there. CUDA graphs keep
its address: it has to be there before the first of them is captured.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# A slice of a dequantised weight, or partial products of all programs that a device has room for:
# those of 132 multiprocessors take 9 MiB. 64 MiB are 8192 outputs of 4096 inputs: enough for
# cuBLAS to fill a GPU with a slice, and most of its reads then come from the L2 cache.
NUM_BYTES = 64 * 2**20
MOST_BLOCKS = 4096  # whose inputs are shared by several programs at once


@dataclass(frozen=True, slots=True)
class Scratch:
    bytes: Tensor  # uint8 [NUM_BYTES]
    arrived: Tensor  # int32 [MOST_BLOCKS], all 0 between two kernels

    def as_(self, dtype: torch.dtype) -> Tensor:
        return self.bytes.view(dtype)


@functools.cache
def scratch_of(device: torch.device) -> Scratch:
    """The device's own; asked for once before a CUDA graph is captured."""
    # A capture would only note that the counters are to be set to 0.
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
    return Scratch(
        torch.empty(NUM_BYTES, dtype=torch.uint8, device=device),
        torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=device),
    )
