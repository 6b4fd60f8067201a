"""Many marks as one light path, and samples thinned to what an eye can tell apart."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, TypeVar

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from morphserve.profile.drawing import COLOURS

Segment = tuple[float, float, float]  # from x, to x, at y
T = TypeVar("T", bound=Hashable)


def draw_segments(
    axes: Axes, segments: Iterable[Segment], colour: str, points: float, *, alpha: float = 1.0
) -> None:
    """Horizontal bars, `points` thick."""
    _draw(axes, segments, colour, points, "butt", alpha)


def draw_dots(
    axes: Axes, at: Iterable[tuple[float, float]], colour: str, points: float, *, alpha: float = 1.0
) -> None:
    """Dots, `points` wide; the axis must have its limits."""
    low, high = axes.get_xlim()
    hair = 1e-5 * (high - low)  # a line of no length has no ends to be round
    _draw(axes, ((x, x + hair, y) for x, y in at), colour, points, "round", alpha)


def _draw(
    axes: Axes,
    segments: Iterable[Segment],
    colour: str,
    points: float,
    ends: Literal["butt", "round"],
    alpha: float,
) -> None:
    vertices = [place for x, end, y in segments for place in ((x, y), (end, y))]
    if not vertices:
        return
    path = Path(vertices, [Path.MOVETO, Path.LINETO] * (len(vertices) // 2))
    path.should_simplify = False
    axes.add_patch(
        PathPatch(
            path,
            facecolor="none",
            edgecolor=COLOURS[colour],
            linewidth=points,
            capstyle=ends,
            alpha=alpha,
            snap=False,
            zorder=3,
        )
    )


def distinct(
    places: Iterable[tuple[float, float]], cell: tuple[float, float]
) -> list[tuple[float, float]]:
    """One of all places that share a cell of this width and height."""
    found = {(round(x / cell[0]), round(y / cell[1])): (x, y) for x, y in places}
    return list(found.values())


def thin(samples: Sequence[tuple[float, float]], step: float) -> list[tuple[float, float]]:
    """Of (time, value) in order: what shows of a staircase if `step` is a hair's breadth.

    The least and the greatest value of each step stay, and the last sample.
    """
    kept: list[tuple[float, float]] = []
    group: list[tuple[float, float]] = []
    for sample in samples:
        if group and int(sample[0] / step) != int(group[0][0] / step):
            kept += _extremes(group)
            group = []
        group.append(sample)
    kept += _extremes(group)
    turns = [b for a, b in zip([None, *kept], kept, strict=False) if a is None or a[1] != b[1]]
    return turns if not samples or turns[-1] == samples[-1] else [*turns, samples[-1]]


def _extremes(group: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if not group:
        return []
    low = min(group, key=lambda sample: sample[1])
    high = max(group, key=lambda sample: sample[1])
    return sorted({group[0], low, high, group[-1]})


def spans(
    values: Iterable[tuple[float, T]], end: float, shortest: float
) -> list[tuple[float, float, T]]:
    """Stretches of equal values as (start, end, value); `values` holds times and values in order.

    One that is shorter than `shortest` is taken over by the next.
    """
    found: list[tuple[float, float, T]] = []
    for at, value in values:
        if found and found[-1][2] == value:
            continue
        if found and at - found[-1][0] < shortest:
            at = found.pop()[0]
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], end, value)
            continue
        if found:
            found[-1] = (found[-1][0], at, found[-1][2])
        found.append((at, end, value))
    return found
