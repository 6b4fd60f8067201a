"""What every format of quantised linears says: its grid, its tensors, and how they are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from morphserve.quantize.files import BadFile
from morphserve.quantize.rounding import Grid
from morphserve.quantize.weights import QuantizedWeight

Kind = Literal["words", "floats", "groups", "sizes"]
DTYPES: Mapping[Kind, tuple[torch.dtype, ...]] = {
    "words": (torch.int32,),
    "floats": (torch.float16, torch.bfloat16, torch.float32),
    "groups": (torch.int32, torch.int64),
    "sizes": (torch.int32, torch.int64),
}


class BadSource(BadFile):
    """The quantised checkpoint is damaged, cannot be read, or does not fit the model."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors of a quantised linear."""

    shape: tuple[int, ...]
    kind: Kind
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """A linear as its file has it; inputs are in the model's order."""

    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # any float [N, groups]
    zeros: Tensor | None  # uint8 [N, groups]; None where the format has none
    group_of: Tensor | None = None  # int [K], the group of each input; None: neighbours


class Format(Protocol):
    """How one tool stores linears, with the settings of one checkpoint."""

    @property
    def name(self) -> str: ...

    @property
    def grid(self) -> Grid: ...

    @property
    def act_order(self) -> bool: ...

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """The tensors of a linear by the last part of their names."""
        ...

    def decode(self, tensors: Mapping[str, Tensor]) -> Stored:
        """A linear from tensors that are as `parts` says."""
        ...


def num_groups(grid: Grid, inputs: int) -> int:
    """Raises ValueError unless groups fill the inputs."""
    size = grid.group_size or inputs
    if inputs % size:
        raise ValueError(f"its groups of {size} do not fill the {inputs} inputs of a linear")
    return inputs // size


def to_weight(stored: Stored, grid: Grid) -> QuantizedWeight:
    """The weight that `stored` stands for, the members of each group side by side.

    Scales become float16, by rounding where they are of another type. Raises ValueError with the
    reason this cannot be done.
    """
    order = None if stored.group_of is None else _order(stored.group_of, stored.scales.shape[1])
    scales = stored.scales.to(torch.float16)
    if not scales.isfinite().all():
        raise ValueError("it has scales that are not finite in float16")
    zeros = stored.zeros
    if grid.symmetric and zeros is not None:
        if not (zeros == grid.middle).all():
            raise ValueError(
                f"its config says symmetric, but zeros differ from {grid.middle}: if the file is "
                "right, say in its config that it is not symmetric"
            )
        zeros = None
    codes = stored.codes if order is None else stored.codes[:, order]
    return QuantizedWeight(
        codes=codes.contiguous(),
        scales=scales.contiguous(),
        group_size=codes.shape[1] // scales.shape[1],
        bits=grid.bits,
        zeros=None if zeros is None else zeros.contiguous(),
        input_order=order,
    )


def _order(group_of: Tensor, groups: int) -> Tensor | None:
    """Inputs by group; None where they are in order already."""
    group_of = group_of.long()
    if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise ValueError(f"its inputs belong to groups that are not among its {groups}")
    if len(set(torch.bincount(group_of, minlength=groups).tolist())) != 1:
        raise ValueError("its groups have different numbers of inputs")
    order = torch.argsort(group_of, stable=True)
    return None if torch.equal(order, torch.arange(len(order))) else order


class Settings:
    """Values of a quantisation config; every refusal is a ValueError that says what was found."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, *names: str) -> Any:
        """The first of these names that has a value; tools spell one setting in several ways."""
        found = (self._values.get(name) for name in names)
        return next((value for value in found if value is not None), None)

    def whole(self, *names: str) -> int:
        value = self.get(*names)
        if type(value) is not int:
            raise ValueError(f"its {names[0]} must be a whole number, not {value!r}")
        return value

    def switch(self, default: bool, *names: str) -> bool:
        value = self.get(*names)
        if value is None:
            return default
        if type(value) is not bool:
            raise ValueError(f"its {names[0]} must be true or false, not {value!r}")
        return value

    def refuse(self, name: str, why: str) -> None:
        """Raises ValueError if this setting says anything."""
        if self.get(name):
            raise ValueError(f"it has {name}, {why}")


def read_grid(bits: int, group_size: int, symmetric: bool) -> Grid:
    """The grid of a config; a group size of -1 means all inputs of a row."""
    if bits not in (4, 8):
        raise ValueError(f"it has {bits} bits: only 4 and 8 are read")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"its group size is {group_size}")
    return Grid(bits, max(group_size, 0), symmetric)
