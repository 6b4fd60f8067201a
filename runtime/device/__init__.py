"""What serving needs of the device it computes on, and the choice of one.

All that knows a GPU from a CPU lies here and in the kernels. Importing this imports no torch.
"""

import importlib.util
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from morphserve.configs.errors import ConfigError
from morphserve.configs.schema import CacheConfig, Defaults, SchedulerConfig
from morphserve.runtime.device.link import Link

if TYPE_CHECKING:
    import torch

    from morphserve.runtime.layers import Layers
    from morphserve.runtime.layout import DeviceMemory
    from morphserve.runtime.model import Model
    from morphserve.runtime.parts import Runner

LEAST_CAPABILITY = (8, 0)  # of a GPU: tensor cores that multiply bfloat16

logger = logging.getLogger(__name__)


class Device(Protocol):
    """Memory, a link from the host's memory into it, and what runs a model in it."""

    kind: str  # cpu or cuda, as `load_kernels` calls its kernels
    name: str  # of the hardware, as its maker calls it
    location: "torch.device"  # of tensors
    defaults: Defaults

    @property
    def num_threads(self) -> int:
        """Threads of the host that compute; 0: none, the device does."""

    def memory(self, cache: CacheConfig, activation_bytes: int) -> "DeviceMemory":
        """What an arena may take beside so many bytes that are not in it."""

    def allocate(self, num_bytes: int) -> "torch.Tensor":
        """uint8 [num_bytes], of any content. Raises OutOfBudget with what to change."""

    def measure(self, run: Callable[[], None]) -> int | None:
        """Bytes that `run` takes of the device beside what stays; None: nobody needs to know.

        Where nobody needs to know, `run` is not called.
        """

    def pin(self, images: Iterable["torch.Tensor"]) -> None:
        """Readies bytes of the host for `link`."""

    def link(self) -> Link:
        """What brings the images given to `pin` into memory that `allocate` gave."""

    def runner(
        self, model: "Model", limits: SchedulerConfig, eos_token_ids: Sequence[int]
    ) -> "Runner":
        """What runs steps of a model whose tensors lie on the device."""

    def warm_up(self, runner: "Runner", layers: "Layers") -> None:
        """Has a runner of `runner` compile and note what steps will need, in any variant."""


def open_device(name: str) -> Device:
    """The device that `--device` names. Raises ConfigError with what to do if there is none."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ConfigError(f"there is no device {name!r}: use auto, cpu, cuda, or cuda:1")
    index = int(match[1] or 0)
    lack = None if name == "cpu" else _lack_of_cuda(index)
    if name == "cpu" or (name == "auto" and lack is not None):
        from morphserve.runtime.device.host import HostDevice

        if lack is not None and num_gpus():
            logger.warning("the CPU serves, though there is a GPU: %s", lack)
        return HostDevice()
    if lack is not None:
        raise ConfigError(f"--device {name} cannot be used: {lack}; or serve with --device cpu")
    from morphserve.runtime.device.cuda import CudaDevice

    return CudaDevice(index)


def num_gpus() -> int:
    """That torch sees; it makes no context on any."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _lack_of_cuda(index: int) -> str | None:
    """What is missing for this GPU, and what to do; None: nothing."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is made without CUDA: install one that is made with it"
    if not num_gpus():
        return "torch sees no GPU: look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES"
    if index >= num_gpus():
        return f"the last GPU that torch sees is cuda:{num_gpus() - 1}"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        return f"its compute capability is {has}, and the kernels need {needs}"
    if importlib.util.find_spec("triton") is None:
        return "its kernels need triton: `pip install triton`"
    return None
