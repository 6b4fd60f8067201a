"""SVG primitives: scales, ticks and marks as strings; colours are CSS classes of the page."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to pixels, linearly or by logarithm."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of `value`; values outside land on the edge."""
        low, high, value = (self._warp(v) for v in (self.low, self.high, value))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(self.start_px + share * (self.end_px - self.start_px), 1)

    def _warp(self, value: float) -> float:
        return math.log10(max(value, 1e-9)) if self.log else value


def nice_ceiling(value: float) -> float:
    """The least of 1, 2, 4, 5, 6, 8, 10 times a power of ten that is not below `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 4, 5, 6, 8, 10) if m * power >= value * (1 - 1e-9))


def short_number(value: float) -> str:
    """`0.5`, `20`, `1,200`, `12k`."""
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def text(x: float, y: float, content: str, css: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" class="{css}" text-anchor="{anchor}">{escape(content)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{css}"/>'


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "") -> str:
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{css}"'
    return f"{shape}>{_title(title)}</rect>" if title else f"{shape}/>"


def dot(x: float, y: float, css: str, title: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="2.2" class="{css}">{_title(title)}</circle>'


def cross(x: float, y: float, css: str, title: str) -> str:
    path = f"M{x - 2.5:g} {y - 2.5:g}l5 5m0 -5l-5 5"
    return f'<path d="{path}" class="{css}">{_title(title)}</path>'


def _title(content: str) -> str:
    return f"<title>{escape(content)}</title>"


def steps(points: Sequence[tuple[float, float]], css: str, floor: float | None = None) -> str:
    """A staircase through `points` (pixels); closed down to `floor` if given."""
    if not points:
        return ""
    (x, y), *others = points
    path = [f"M{x:g} {y:g}"]
    for at, level in others:
        if level != y:
            path.append(f"H{at:g}V{level:g}")
            y = level
    path.append(f"H{points[-1][0]:g}")
    if floor is not None:
        path.append(f"V{floor:g}H{x:g}Z")
    return f'<path d="{"".join(path)}" class="{css}"/>'


def spans(values: Iterable[tuple[float, str]], end: float) -> list[tuple[float, float, str]]:
    """Runs of equal values as `(start, end, value)`; `values` holds times and values in order."""
    found: list[tuple[float, float, str]] = []
    for at, value in values:
        if found and found[-1][2] == value:
            continue
        if found:
            found[-1] = (found[-1][0], at, found[-1][2])
        found.append((at, end, value))
    return found
