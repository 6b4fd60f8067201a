"""Host tensors to a device, without waiting for what it is doing."""

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Of the same numbers; a copy to a GPU is queued behind what it does.

    Such a copy needs pinned memory: from other memory it would first wait for the GPU. Pinned
    memory comes from torch's host allocator, which gives it out again only after the copies that
    were queued from it.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
