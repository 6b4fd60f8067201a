"""A profile as JSON, drawings and a page that needs nothing but itself."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import msgspec
from jinja2 import Environment, StrictUndefined

from morphserve.profile.drawing import COLOURS, DARK_COLOURS, as_file, as_inline_svg
from morphserve.profile.figure import both_figure, ladder_figure, layers_figure, orders_figure
from morphserve.profile.result import Profile
from morphserve.profile.verdict import chosen_order, headline, verdict
from morphserve.quantize.files import BadFile, write_atomically
from morphserve.quantize.manifest import Quantization, Ranking, TextSample, Variant

_PAGE = Path(__file__).with_name("report.html")
_ORDERS = "KL divergence by number of INT4 layers, one line per order; the table below has it too"
_LAYERS = "KL divergence of each layer alone at INT4; the table below has it too"
_LADDER = "KL divergence by bytes freed: through INT8 to INT4, and by INT4 alone"


def make_folder(folder: Path) -> None:
    """Raises BadFile unless files can be written to the folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadFile(
            f"cannot write to {folder} ({error.strerror}): choose another folder for the report"
        ) from error


def write_report(profile: Profile, folder: Path) -> Path:
    """Writes profile.json, .svg, .png and .html; returns the page."""
    figure = both_figure(profile.ranking)
    page = folder / "profile.html"
    make_folder(folder)
    data = msgspec.json.format(msgspec.json.encode(profile), indent=2)
    write_atomically(folder / "profile.json", data + b"\n")
    write_atomically(folder / "profile.svg", as_file(figure, "svg"))
    write_atomically(folder / "profile.png", as_file(figure, "png"))
    write_atomically(page, render_page(profile).encode())
    return page


def render_page(profile: Profile) -> str:
    """The page; it needs no other file, and follows the reader's light or dark scheme."""
    ranking, ladder = profile.ranking, profile.ranking.ladder
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"thousandths": lambda value: f"{1e3 * value:.3f}"}
    return environment.from_string(_PAGE.read_text("utf-8")).render(
        profile=profile,
        ranking=ranking,
        colours=COLOURS,
        dark_colours=DARK_COLOURS,
        chosen=chosen_order(ranking),
        headline=headline(ranking),
        sentences=verdict(ranking),
        orders_svg=as_inline_svg(orders_figure(ranking), _ORDERS),
        layers_svg=as_inline_svg(layers_figure(ranking), _LAYERS),
        ladder_svg=as_inline_svg(ladder_figure(ranking, ladder), _LADDER) if ladder else "",
        variants=sorted(profile.quantization),
        methods=[_method(variant, how) for variant, how in sorted(profile.quantization.items())],
        texts=list(_texts(ranking)),
    )


def _method(variant: Variant, how: Quantization) -> str:
    groups = f"groups of {how.group_size}" if how.group_size else "one scale per row"
    sides = "symmetric" if how.symmetric else "asymmetric"
    use = "errors measured on" if how.method == "rtn" else "calibrated on"
    text = f"; {use} {_show(how.calibration)}" if how.calibration else ""
    return f"{variant}: {how.method}, {how.bits} bits, {groups}, {sides}{text}"


def _texts(ranking: Ranking) -> Iterator[tuple[str, str]]:
    yield "layers scored on", _show(ranking.calibration)
    yield "order chosen on", _show(ranking.selection)
    yield "figures reported of", _show(ranking.evaluation)


def _show(sample: TextSample) -> str:
    return (
        f"{sample.num_windows} windows of {sample.window_tokens} tokens, {sample.source}, seed "
        f"{sample.seed} (sha256 {sample.sha256[:12]}…)"
    )
