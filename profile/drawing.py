"""How every drawing looks, and how it becomes a file or a part of a page."""

import io
import re
from html import escape
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.figure import Figure

# After Okabe and Ito: told apart by colour-blind readers too. In a page each colour becomes the
# custom property of its name, so that the page's scheme, light or dark, decides.
COLOURS = {
    "ink": "#1b1b19",
    "muted": "#6d6c66",
    "grid": "#e6e5df",
    "card": "#fdfdfb",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "pink": "#b3628f",
    "yellow": "#c08a00",
    "grey": "#a9a8a1",
    "shade": "#f3ecd9",
    "full": "#cfe1ee",
    "int8": "#f0c36d",
    "moving": "#4d4c47",
}
DARK_COLOURS = {
    "ink": "#f0efea",
    "muted": "#a2a19a",
    "grid": "#31302d",
    "card": "#1c1c1a",
    "blue": "#56b4e9",
    "orange": "#f08c3c",
    "green": "#34c79a",
    "pink": "#dd95bd",
    "yellow": "#e8c35a",
    "grey": "#6b6a64",
    "shade": "#332b19",
    "full": "#29475d",
    "int8": "#efdc9c",
    "moving": "#9a9992",
}
STYLE: Any = {  # matplotlib types its keys one by one
    "axes.edgecolor": COLOURS["muted"],
    "axes.facecolor": COLOURS["card"],
    "axes.grid": True,
    "axes.labelcolor": COLOURS["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "figure.facecolor": COLOURS["card"],
    "font.size": 9.5,
    "grid.color": COLOURS["grid"],
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
}


def as_file(figure: Figure, kind: Literal["svg", "png"], title: str | None = None) -> bytes:
    """The drawing in light colours; the same bytes for the same figures."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": "morphserve"}):
        if kind == "png":
            figure.savefig(buffer, format=kind, dpi=160)
            return buffer.getvalue()
        metadata = {"Date": None} | ({"Title": title} if title else {})
        figure.savefig(buffer, format=kind, metadata=metadata)
    return _compact(buffer.getvalue().decode()).encode()


def inline_svg(svg: bytes, alt: str) -> str:
    """A drawing's file as an <svg> element of a page.

    Its colours are the page's custom properties (`--ink`, ...), and it names no address.
    """
    text = svg.decode()
    text = text[text.index("<svg") :].replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    text = re.sub(r"\s*<(title|metadata)>.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    for name, value in COLOURS.items():
        text = re.sub(value, f"var(--{name})", text, flags=re.IGNORECASE)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def as_inline_svg(figure: Figure, alt: str) -> str:
    """A figure as an <svg> element of a page."""
    return inline_svg(as_file(figure, "svg"), alt)


def _compact(svg: str) -> str:
    """Paths to a tenth of a point, without the names that nothing refers to."""
    used = set(re.findall(r'#([\w.-]+)["\')]', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    return re.sub(r' d="([^"]+)"', lambda found: f' d="{_compact_path(found[1])}"', svg)


def _compact_path(path: str) -> str:
    path = re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda found: f"{round(float(found[0]), 1):g}", path)
    path = re.sub(r"\s*([A-Za-z])\s*", r"\1", path)
    return re.sub(r"M([^A-Za-z]+)L\1(?![\d.])", r"M\1h0", path)  # dots
