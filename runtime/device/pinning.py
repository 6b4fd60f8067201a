"""Host memory that a GPU can read by itself: the pages of images, locked where they are.

Not by torch's `pin_memory`: it copies, and rounds each tensor up to a power of two.
"""

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from morphserve.runtime.memory import align

PAGE_BYTES = (
    4096  # of the host; images begin at a page's start and share their last one with nobody
)

_ALREADY = 712  # cudaErrorHostMemoryAlreadyRegistered: for another engine of the same model

logger = logging.getLogger(__name__)


class Cudart(Protocol):
    """What is used of torch.cuda.cudart(). Results are CUDA's error codes, 0 is success."""

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int, /) -> Any: ...

    def cudaHostUnregister(self, pointer: int, /) -> Any: ...


def pin(images: Iterable[Tensor], cudart: Cudart, forget_error: Callable[[], None]) -> bool:
    """Locks the pages of these tensors for as long as they live; False if not all could be.

    `forget_error` is called after one that is handled here.
    """
    num_bytes = 0
    for image in images:
        size = align(image.numel(), PAGE_BYTES)
        assert image.data_ptr() % PAGE_BYTES == 0
        code = int(cudart.cudaHostRegister(image.data_ptr(), size, 0))
        if code:
            forget_error()
        if code == _ALREADY:
            continue
        if code:
            _warn(num_bytes, size, code)
            return False
        finish = weakref.finalize(image, _unpin, cudart, image.data_ptr())
        finish.atexit = False  # the process takes its memory along
        num_bytes += size
    return True


def _unpin(cudart: Cudart, pointer: int) -> None:
    code = int(cudart.cudaHostUnregister(pointer))
    if code:
        logger.warning("host memory stays locked: CUDA error %d", code)


def _warn(pinned: int, wanted: int, code: int) -> None:
    logger.warning(
        "host memory cannot be locked for the GPU (CUDA error %d, after %.0f MiB, at %.0f more): "
        "layers are copied in small pieces, each of which holds up a step by about a millisecond, "
        "and a swap takes many steps. Free main memory, or raise the limit of locked memory: "
        "`ulimit -l unlimited`, in a container `--ulimit memlock=-1`",
        code,
        pinned / 2**20,
        wanted / 2**20,
    )
