"""The report needs nothing but itself, and says what the figures say."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from morphserve.profile.figure import both_figure, layers_figure
from morphserve.profile.independence import Independence, Probe
from morphserve.profile.positions import SCHEDULES, Positions, Schedule
from morphserve.profile.report import render_page, write_report
from morphserve.profile.result import Profile
from morphserve.profile.verdict import headline, verdict
from morphserve.quantize.files import BadFile
from morphserve.quantize.manifest import (
    Ladder,
    LayerScores,
    LisSettings,
    Quantization,
    RankedOrder,
    Ranking,
    Rung,
    TextSample,
    Variant,
)

TEXT = TextSample("some <text>.txt, last quarter", "ab" * 32, 4, 256, 0)
SCORING = TextSample("some <text>.txt, first half", "cd" * 32, 4, 256, 0)
CHOOSING = TextSample("some <text>.txt, third quarter", "ef" * 32, 4, 256, 0)
INT8, INT4 = Variant.INT8, Variant.INT4


def order(name: str, layers: list[int], divergence: list[float]) -> RankedOrder:
    perplexity = [10 + value for value in divergence]
    return RankedOrder(name, layers, [], divergence, perplexity, divergence)


def ranking(*orders: RankedOrder) -> Ranking:
    rungs = [Rung(i, to) for to in (INT8, INT4) for i in range(3)]
    return Ranking(
        calibration=SCORING,
        selection=CHOOSING,
        evaluation=TEXT,
        replaced=[0, 1, 2, 3],
        layers=[LayerScores({INT4: 300, INT8: 200}, {INT4: 0.1, INT8: 0.01}, 0.9, 0.99, 0.999)] * 3,
        orders=list(orders),
        chosen=orders[0].name,
        lis=LisSettings(),
        ladder=Ladder("kl-per-byte", rungs, [2, 4, 6, 7, 8, 9], [0.1, 0.2, 0.3, 0.5, 0.7, 0.9]),
    )


LIS = order("lis", [2, 1, 0], [0, 0.001, 0.003, 0.01])
FRONT = order("front-to-back", [0, 1, 2], [0, 0.002, 0.006, 0.01])
RANDOM = [order(f"random-{i}", [1, 2, 0], [0, 0.004, 0.004, 0.01]) for i in range(2)]


@pytest.fixture
def profile() -> Profile:
    schedules = [
        Schedule(name, [part == "q" for part in parts], [0.001] * 8, 0.00125, 10.0)
        for name, parts in SCHEDULES.items()
    ]
    study = Independence(
        text=TEXT,
        order=[2, 1, 0],
        probed=[0, 1, 2],
        probes=[Probe(0, [0.1, 0.2, -0.1], [0.001, 0.002, 0.003])],
        replaced=[1, 2, 3],
        joint=[0.001, 0.002, 0.004],
        summed=[0.001, 0.002, 0.005],
    )
    how = Quantization("gptq", 4, 128, symmetric=True, calibration=TEXT)
    variants = {INT4: how, INT8: Quantization("rtn", 8, 0, symmetric=True)}
    found = ranking(LIS, FRONT, *RANDOM)
    return Profile("a <model>", "today", variants, found, study, Positions(TEXT, schedules))


def test_words_follow_the_figures() -> None:
    found = ranking(LIS, FRONT, *RANDOM)
    assert headline(found) == (
        "lis is the order to demote layers in: 2 of 3 layers at INT4 cost 3.00e-3 nats of KL "
        "per token, all of them 10.00e-3"
    )
    margins, perplexity = verdict(found)
    assert "its mean KL over 1, 2 INT4 layers is 2.00e-3: 50% below front-to-back" in margins
    assert margins.count("front-to-back") == 1
    assert "50% below 2 random orders on average" in margins
    assert perplexity.startswith("Perplexity is 10.000 at full precision and 10.010 (+0.10%)")
    assert "100% above lis, the best of the others" in verdict(ranking(FRONT, LIS))[0]
    assert (
        "as much as front-to-back"
        in verdict(ranking(order("lis", [2, 1, 0], FRONT.divergence), FRONT))[0]
    )
    assert len(verdict(ranking(FRONT))) == 1  # nothing to compare with
    free = order("free", [1, 0, 2], [0, 0, 0, 0.01])
    assert "is 2.00e-3: above free, the best of the others" in verdict(ranking(LIS, free))[0]
    free_too = order("free, too", [2, 0, 1], [0, 0, 0, 0.01])
    assert "as much as free, the best" in verdict(ranking(free_too, free))[0]


def test_one_layer_has_a_headline_too() -> None:
    one = msgspec.structs.replace(ranking(order("lis", [0], [0, 0.004])), replaced=[0, 1])
    assert headline(one) == "the only layer costs 4.00e-3 nats of KL per token at INT4"


@pytest.mark.parametrize(("num_layers", "numbered"), [(3, 3), (40, 40), (80, 0)])
def test_bars_are_numbered_while_numbers_do_not_overlap(num_layers: int, numbered: int) -> None:
    chosen = order("lis", list(range(num_layers))[::-1], LIS.divergence)
    layers = ranking(LIS).layers[:1] * num_layers
    found = msgspec.structs.replace(ranking(chosen), layers=layers)
    for figure in (layers_figure(found), both_figure(found)):
        figure.draw_without_rendering()
        axes = figure.axes[-1]
        assert ("its place" in axes.get_xlabel()) == bool(numbered)
        assert len(axes.texts) == numbered
        boxes = [text.get_window_extent() for text in axes.texts]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_only_methods_that_use_text_are_called_calibrated(profile: Profile) -> None:
    rounded = Quantization("rtn", 8, 0, symmetric=True, calibration=TEXT)
    page = render_page(
        msgspec.structs.replace(profile, quantization=profile.quantization | {INT8: rounded})
    )
    assert "int8: rtn, 8 bits, one scale per row, symmetric; errors measured on 4 windows" in page
    assert "int4: gptq, 4 bits, groups of 128, symmetric; calibrated on 4 windows" in page


class Links(HTMLParser):
    """What a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset") and not (value or "").startswith(
                "#"
            ):
                self.found.append(f"{tag} {value}")


def test_the_page_needs_nothing_else_and_escapes_names(profile: Profile) -> None:
    page = render_page(profile)
    links = Links()
    links.feed(page)
    assert links.found == []
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert "a &lt;model&gt;" in page and "<model>" not in page
    assert "some &lt;text&gt;.txt" in page
    for study in ("Through INT8", "whatever else is INT4", "early or late"):
        assert study in page


def test_each_text_is_told_with_what_it_was_used_for(profile: Profile) -> None:
    page = render_page(profile)
    for use, part, sha256 in (
        ("layers scored on", "first half", "cdcdcd"),
        ("order chosen on", "third quarter", "efefef"),
        ("figures reported of", "last quarter", "ababab"),
    ):
        told = re.search(rf"<dt>{use}</dt><dd>(.*?)</dd>", page)
        assert told is not None
        assert f", {part}, seed" in told[1] and f"sha256 {sha256}" in told[1]


def test_the_cost_of_a_schedule_over_all_tokens_is_no_mean_of_its_parts(profile: Profile) -> None:
    page = render_page(profile)
    assert page.count("<td>1.25</td>\n<td>10.000</td>") == len(SCHEDULES)


def test_colours_of_inline_drawings_are_the_pages(profile: Profile) -> None:
    page = render_page(profile)
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        assert "var(--ink)" in drawing
        assert not re.search(r"(fill|stroke): #[0-9a-f]{6}", drawing)


def test_a_page_without_studies_or_lis_is_whole(profile: Profile) -> None:
    bare = msgspec.structs.replace(
        profile.ranking,
        lis=None,
        ladder=None,
        layers=[LayerScores({INT4: 300, INT8: 200}, {INT4: 0.1, INT8: 0.01})] * 3,
    )
    page = render_page(
        msgspec.structs.replace(profile, ranking=bare, independence=None, positions=None)
    )
    assert "Through INT8" not in page
    assert page.count("<svg") == 2


def test_files_are_drawings_and_the_same_twice(profile: Profile, tmp_path: Path) -> None:
    for folder in (tmp_path / "a" / "b", tmp_path / "c"):
        assert write_report(profile, folder) == folder / "profile.html"
    written = sorted((tmp_path / "c").iterdir())
    assert [path.name for path in written] == [
        f"profile.{kind}" for kind in ("html", "json", "png", "svg")
    ]
    for path in written:
        assert path.read_bytes() == (tmp_path / "a" / "b" / path.name).read_bytes()
    ElementTree.fromstring((tmp_path / "c" / "profile.svg").read_text())
    assert (tmp_path / "c" / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert (
        msgspec.json.decode((tmp_path / "c" / "profile.json").read_bytes(), type=Profile) == profile
    )


def test_a_folder_that_cannot_be_made_is_named(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match="file/report"):
        write_report(profile, tmp_path / "file" / "report")
