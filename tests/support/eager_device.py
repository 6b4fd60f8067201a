"""A device with streams, whose work is done as it is given, in main memory."""

from collections.abc import Sequence

from torch import Tensor

from morphserve.configs.schema import SchedulerConfig
from morphserve.runtime.device.host import HostDevice
from morphserve.runtime.device.streams import StreamLink
from morphserve.runtime.device.uploading import Uploading
from morphserve.runtime.model import Model
from morphserve.runtime.runner import Runner


class _Past:
    def query(self) -> bool:
        return True


class EagerStream:
    def __init__(self) -> None:
        self.copied: list[int] = []  # bytes of each piece

    def copy(self, destination: Tensor, source: Tensor) -> None:
        self.copied.append(len(source))
        destination.copy_(source)

    def pause(self) -> None:
        pass

    def record(self) -> _Past:
        return _Past()

    def wait(self, event: _Past) -> None:
        pass


class EagerDevice(HostDevice):
    """All that a GPU's parts do beside the calls of torch.cuda."""

    def __init__(self) -> None:
        super().__init__()
        self.compute, self.side = EagerStream(), EagerStream()

    def link(self) -> StreamLink:  # type: ignore[override]
        return StreamLink(self.compute, self.side, is_pinned=True)

    def runner(self, model: Model, limits: SchedulerConfig, eos_token_ids: Sequence[int]) -> Runner:
        return Runner(Uploading.of(model), eos_token_ids)
