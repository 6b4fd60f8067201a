"""What unpacking codes means, for Triton's interpreter; tests of CUDA linears import it."""

import numpy as np
from triton_interpreter import emulate, narrow

from morphserve.runtime.kernels.cuda.codes import UNPACK_INT4, UNPACK_INT8


def _unpack(words: np.ndarray, bits: int) -> tuple[np.ndarray, ...]:
    """The codes of each 16-bit word less their middle, as bits of bfloat16."""
    middle, mask = 1 << bits - 1, (1 << bits) - 1
    unsigned = words.view(np.uint16).astype(np.int32)
    codes = (unsigned >> shift & mask for shift in range(0, 16, bits))
    return tuple(narrow(code - middle) for code in codes)


emulate(UNPACK_INT4.value, lambda words: _unpack(words, 4))
emulate(UNPACK_INT8.value, lambda words: _unpack(words, 8))
