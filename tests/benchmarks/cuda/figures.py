"""What a section finds: figures, written as they are found and shown as one compact table."""

import json
import math
import operator
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

_SENSES: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Gate:
    """What a figure should be."""

    sense: str  # "<=" or ">="
    limit: float

    def holds(self, value: float) -> bool:
        return _SENSES[self.sense](value, self.limit)

    def __str__(self) -> str:
        return f"{self.sense} {self.limit:.3g}"


@dataclass(frozen=True, slots=True)
class Figure:
    section: str
    line: str  # figures of one line stand side by side in the table
    label: str
    value: float | str
    unit: str = ""
    gate: Gate | None = None
    in_table: bool = True

    @property
    def holds(self) -> bool | None:
        """None where nothing is asked of it."""
        if self.gate is None or isinstance(self.value, str):
            return None
        return self.gate.holds(self.value)

    def encode(self) -> str:
        return json.dumps(asdict(self))


def plain(figure: Figure) -> dict[str, object]:
    """For a file. JSON knows no infinity: it is told in words."""
    fields = asdict(figure) | {"holds": figure.holds}
    if not isinstance(figure.value, str) and not math.isfinite(figure.value):
        fields["value"] = str(figure.value)
    return fields


def decode(line: str) -> Figure:
    fields = json.loads(line)
    gate = fields.pop("gate")
    return Figure(**fields, gate=None if gate is None else Gate(**gate))


@dataclass(slots=True)
class Figures:
    """Those of one section; `tell` gets each one at once, so that none is lost by a crash."""

    section: str
    tell: Callable[[Figure], None]
    told: list[Figure] = field(default_factory=list)

    def add(
        self,
        line: str,
        label: str,
        value: float | str,
        unit: str = "",
        gate: Gate | None = None,
        in_table: bool = True,
    ) -> None:
        figure = Figure(self.section, line, label, value, unit, gate, in_table)
        self.told.append(figure)
        self.tell(figure)


def table(figures: Iterable[Figure], width: int = 150) -> str:
    """A line per line, or more where it is long; MISS after what does not hold."""
    lines: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        if figure.in_table:
            lines.setdefault((figure.section, figure.line), []).append(figure)
    rows, section = [], ""
    for (of, name), cells in lines.items():
        if of != section:
            section = of
            rows.append(f"-- {section}")
        texts = [*map(_cell, cells), *_gates(cells)]
        rows += textwrap.wrap(
            f"{name:24} " + " | ".join(texts),
            width,
            subsequent_indent=" " * 27,
            break_long_words=False,
            drop_whitespace=True,
        )
    return "\n".join(rows)


def _cell(figure: Figure) -> str:
    value = figure.value if isinstance(figure.value, str) else f"{figure.value:.3g}"
    missed = " MISS" if figure.holds is False else ""
    return " ".join(filter(None, (figure.label, value, figure.unit))) + missed


def _gates(cells: Sequence[Figure]) -> list[str]:
    gates = dict.fromkeys(str(cell.gate) for cell in cells if cell.gate is not None)
    return [f"[{', '.join(gates)}]"] if gates else []
