"""Charts of characters: they read without colour too."""

from collections.abc import Sequence

from rich.text import Text

from morphserve.morphcli.top.history import Point

_BARS = " ▁▂▃▄▅▆▇█"
_ROOM = "·"  # capacity that is not used
USED, CAPACITY, FULL = "#58a6ff", "#39c5cf", "#8b949e"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values from 0 to their largest."""
    values = values[-width:]
    top = max(values, default=0.0)
    return "".join(_bar(value / top if top else 0.0) for value in values).rjust(width)


def kv_chart(points: Sequence[Point], most: int, full: int, width: int, height: int) -> Text:
    """Used blocks as bars in the room that there was, on a scale of `most` blocks.

    Room that layers gave is drawn above the line of capacity at full precision.
    """
    label = max(len(f"{most}"), 3)
    columns = [_column(point, most, height) for point in points[-max(1, width - label - 1) :]]
    full_row = min(height - 1, max(0, round(full / max(most, 1) * height) - 1))
    text = Text(no_wrap=True)
    for row in reversed(range(height)):
        mark = f"{most}" if row == height - 1 else f"{full}" if row == full_row else ""
        text.append(mark.rjust(label), FULL)
        text.append("┤" if mark else "│", FULL)
        for column in columns:
            text.append(*column[row])
        if row:
            text.append("\n")
    return text


def _column(point: Point, most: int, height: int) -> list[tuple[str, str]]:
    """Cells from the bottom up."""
    used, capacity = (n / max(most, 1) * height for n in (point.used, point.capacity))
    cells = []
    for row in range(height):
        if row < used and (used - row >= 1 / 8 or row == 0):
            cells.append((_bar(min(1.0, used - row)), USED))
        elif row < capacity and capacity - row >= 0.5:
            edge = capacity - row < 1.5
            cells.append(("─" if edge else _ROOM, CAPACITY))
        else:
            cells.append((" ", ""))
    return cells


def _bar(share: float) -> str:
    """Blank for nothing only."""
    least = 1 if share > 0 else 0
    return _BARS[min(len(_BARS) - 1, max(least, round(share * (len(_BARS) - 1))))]
