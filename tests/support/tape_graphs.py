"""CUDA graphs without a GPU: a tape of what a capture would launch, run again on the same tensors.

A number that was read while capturing, or a tensor that was made outside and changes from step to
step, stays on the tape as it was, as it would in a graph. What a capture forbids is an error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map
from triton.runtime import interpreter

aten = torch.ops.aten
FORBIDDEN = {  # they wait for the device
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.lift_fresh.default,  # of numbers on the host
}
EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default}


@dataclass
class TapeGpu:
    """Stands for `CudaGpu`: everything runs at once, on the CPU."""

    fails: Callable[[int], bool] = lambda count: False  # whether the capture after so many fails
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    captures: int = 0
    waits: int = 0  # for a mark
    lost: bool = False
    rehearses: bool = True  # else the kernels are compiled as they are, and slow to run
    queue: list[Callable[[], None]] | None = None  # what was launched and not run, while `late`
    num_run: int = 0  # of the queue

    def pinned(self, count: int) -> Tensor:
        return torch.full((count,), 0x3FFFFFFF, dtype=torch.int32)

    def mark(self) -> "Mark":
        return Mark(self, len(self.queue or ()))

    def rehearse(self, run: Callable[[], object]) -> None:
        if self.rehearses:
            run()

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        if self.fails(self.captures):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        tape: list[Callable[[], None]] = []
        with _Recorder(tape), _kernels_noted(lambda kernel, launch: tape.append(launch)):
            run()

        def replay() -> None:
            if self.queue is not None:
                return self.queue.append(replay_now)
            for launched in _counting:
                launched.append("replay")
            replay_now()

        def replay_now() -> None:
            with _disable_current_modes():  # to the host it is one launch
                for launch in tape:
                    launch()

        return replay

    def free_bytes(self) -> int:
        return 2**30 - 2**16 * self.captures

    def is_lost(self) -> bool:
        return self.lost

    @contextmanager
    def late(self) -> Iterator[None]:
        """What is launched within is run when somebody waits for it, and no sooner."""
        self.queue = [] if self.queue is None else self.queue
        with _Recorder(self.queue), _kernels_noted(lambda _, launch: self.launch(launch)):
            yield

    def launch(self, run: Callable[[], None]) -> None:
        """Another kernel."""
        run() if self.queue is None else self.queue.append(run)


@dataclass
class Mark:
    gpu: TapeGpu
    place: int = 0  # in the queue

    def synchronize(self) -> None:
        self.gpu.waits += 1
        for run in (self.gpu.queue or [])[self.gpu.num_run : self.place]:
            with _disable_current_modes():
                run()
        self.gpu.num_run = max(self.gpu.num_run, self.place)


class _Recorder(TorchDispatchMode):
    """Notes operations and computes none: weights that are captured may not be in place."""

    def __init__(self, tape: list[Callable[[], None]]) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert not _waits(func, args), f"{func} in a capture"
        if func.is_view:
            return func(*args, **kwargs)
        if written := _written(func, args, kwargs):
            self._tape.append(partial(func, *args, **kwargs))
            return written[0]
        made = tree_map(_memory_like, func(*tree_map(_zeros_like, args), **kwargs))
        if func not in EMPTY:
            self._tape.append(partial(_run_again, func, args, kwargs, _tensors(made)))
        return made


def _waits(func: Any, args: Any) -> bool:
    """Whether the host would have to know what is in a tensor."""
    if func in (aten.index.Tensor, aten.index_put_.default):
        return any(index is not None and index.dtype is torch.bool for index in args[1])
    return func in FORBIDDEN


def _zeros_like(value: Any) -> Any:
    """The same shape without the content, which may be no sound index or number."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()


def _memory_like(value: Any) -> Any:
    """Memory that nobody has written holds anything."""
    if not isinstance(value, Tensor):
        return value
    memory = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if memory.is_floating_point():
        return memory.fill_(float("nan"))
    return memory if memory.dtype is torch.bool else memory.fill_(torch.iinfo(memory.dtype).max)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes in place."""
    arguments = func._schema.arguments
    given = dict(zip([argument.name for argument in arguments], args, strict=False)) | kwargs
    return [
        given[argument.name]
        for argument in arguments
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and argument.name in given
    ]


def _run_again(func: Any, args: Any, kwargs: dict[str, Any], made: list[Tensor]) -> None:
    for tensor, value in zip(made, _tensors(func(*args, **kwargs)), strict=True):
        tensor.copy_(value)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


@contextmanager
def _kernels_noted(note: Callable[[Any, Callable[[], None]], None]) -> Iterator[None]:
    """Calls `note` with each interpreted kernel and what runs it, instead of running it."""
    run = interpreter.InterpretedFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        note(self, partial(run, self, *args, **kwargs))

    interpreter.InterpretedFunction.run = noted
    try:
        yield
    finally:
        interpreter.InterpretedFunction.run = run


_counting: list[list[str]] = []  # lists that launches are noted in


class _Counter(TorchDispatchMode):
    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self._launched = launched

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func not in EMPTY:
            self._launched.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Names of what is launched by itself: kernels, and operations that compute or write."""
    launched: list[str] = []

    def note(kernel: Any, launch: Callable[[], None]) -> None:
        launched.append(kernel.fn.__name__)
        with _disable_current_modes():
            launch()

    _counting.append(launched)
    try:
        with _kernels_noted(note), _Counter(launched):
            yield launched
    finally:
        _counting.remove(launched)
