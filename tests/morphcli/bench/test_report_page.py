"""The report's page: whole, without links outside, readable in light and dark and on a phone."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from bench_runs import answered, make_run, make_summary, page_of, state, unanswered
from bench_scenes import scene

from morphserve.morphcli.bench.definitions import DEFINITIONS, definition_of
from morphserve.morphcli.bench.quality_table import quality_rows
from morphserve.morphcli.bench.report import write_report
from morphserve.morphcli.bench.summary import Run
from morphserve.morphcli.bench.table import table_rows
from morphserve.morphcli.bench.tiles import headline_tiles

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<script>alert('&\"')</script>"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.labels: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        found = dict(attrs)
        links = [name for name in ("src", "href", "srcset", "data", "xlink:href") if name in found]
        self.links += [found[name] or "" for name in links]
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag == "svg":
            assert found["role"] == "img"
            self.labels.append(found["aria-label"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(*scene(repeats=2, rates=(0.5, 1.0, 2.0), seconds=20))


def test_the_page_is_whole_and_needs_nothing_else(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "://" not in page and "@import" not in page and not re.search(r"url\((?!#)", page)
    assert not {"script", "link", "iframe", "object", "img"} & tags.names
    assert tags.links and all(link.startswith("#") for link in tags.links)
    assert {link[1:] for link in tags.links} <= set(tags.ids)


def test_every_drawing_is_there_with_words_for_who_cannot_see_it(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert len(tags.labels) == 15 and all(len(label) > 40 for label in tags.labels)
    for label in (
        "morph missed the target for",
        "static INT4 over time: ",
        "Goodput over requests",
    ):
        assert any(label in found for found in tags.labels)


def test_drawings_take_the_colours_of_the_page(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 15
    for drawing in drawings:
        assert "var(--ink)" in drawing
        assert not re.search(r"(fill|stroke): #[0-9a-f]{6}", drawing)


def test_every_row_of_a_table_has_a_definition() -> None:
    summary, _, _ = scene(repeats=2, seconds=20)
    rows = [*table_rows(summary), *quality_rows(summary)]
    assert len(rows) > 20
    assert [row.label for row in rows if definition_of(row.label) is None] == []
    assert len({definition.anchor for definition in DEFINITIONS}) == len(DEFINITIONS)


def test_rows_lead_to_the_word_that_explains_them() -> None:
    for label, word in (
        ("95 % of requests had their first token within", "time to first token"),
        ("95 % of answers took per further token at most", "time per further token"),
        ("of 5 requests, missed the target (first token ≤ 1 s)", "missed the target"),
        ("perplexity of what was served (lower is better)", "perplexity"),
        ("95 % of gaps between tokens were at most", "gap between tokens"),
        ("95 % of requests had their whole answer within", "whole answer"),
        ("95 % of requests were queued in the server for at most", "queue time"),
        ("requests per second within the target", "goodput"),
        ("all layers at full precision again after the burst", "full precision again"),
    ):
        found = definition_of(label)
        assert found is not None and found.word == word


def test_what_many_runs_need_is_told(page: str) -> None:
    for words in (
        "6 policies",
        "the one in the middle is drawn",
        "the one at the schedule&#39;s own rate is drawn",
        "All scales are the same for every policy",
        "Every run, in the order in which they ran",
        "Whiskers: 95 % interval",
        "Each mix of layers that was served",
    ):
        assert words in page


def test_notes_of_a_summary_stand_above_the_timelines() -> None:
    summary, runs, schedule = scene(("full",), seconds=10)
    summary.notes = ["Layers are those of one replica of four."]
    assert "Layers are those of one replica of four." in page_of(summary, runs, schedule)


def test_the_first_numbers_are_of_morph_against_full_precision() -> None:
    summary, _, _ = scene(seconds=72)
    title, tiles = headline_tiles(summary)
    assert title == "morph against full precision"
    assert [tile.title for tile in tiles] == [
        "first token",
        "missed the target",
        "throughput",
        "quality loss",
    ]
    assert tiles[0].number.endswith("× sooner") and tiles[0].is_good
    assert tiles[3].number == "+0.60 %" and "static INT4 +4.10 %" in tiles[3].detail


def test_a_loss_is_shown_as_one() -> None:
    quick, slow = [answered(i, 0.2) for i in range(5)], [answered(i, 3.0) for i in range(5)]
    states = [state(0, 4, 0), state(3, 0, 50)]
    summary, _ = make_summary([make_run("full", quick, states), make_run("morph", slow, states)])
    _, (first, missed, *_) = headline_tiles(summary)
    assert (first.number, first.is_good) == ("15.0 × later", False)
    assert (missed.number, missed.is_good) == ("100 %", False)


def test_no_number_has_a_colour_where_the_verdict_calls_neither_better() -> None:
    never = [unanswered(i, status=503) for i in range(5)]
    for one, other in ((never, never), ([answered(0, 0.2)], [answered(0, 0.21)])):
        summary, _ = make_summary([make_run("full", one, []), make_run("morph", other, [])])
        assert [tile.is_good for tile in headline_tiles(summary)[1]] == [None] * 3


@pytest.mark.parametrize(
    ("ours", "number"),
    [
        (0, "none"),
        (1, "99.9 % fewer"),
        (300, "70 % fewer"),
        (999, "0.1 % fewer"),
        (1000, "as many"),
    ],
)
def test_only_no_miss_at_all_is_called_none(ours: int, number: str) -> None:
    def run(policy: str, misses: int) -> Run:
        outcomes = [answered(i, 3.0 if i < misses else 0.2) for i in range(2000)]
        return make_run(policy, outcomes, [])

    summary, _ = make_summary([run("full", 1000), run("morph", ours)])
    assert headline_tiles(summary)[1][1].number == number


def test_a_run_that_proves_nothing_has_no_headline_numbers() -> None:
    broken = [answered(0, 0.2), unanswered(1)]
    runs = [make_run("full", broken, []), make_run("morph", broken, [])]
    summary, schedule = make_summary(runs)
    assert headline_tiles(summary) == ("", [])
    page = page_of(summary, runs, schedule)
    assert 'class="verdicts invalid"' in page and "This run proves nothing" in page


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    run = make_run(HOSTILE, [answered(0, 0.2), unanswered(1, status=503)], [state(0, 0, 0)])
    summary, schedule = make_summary([run])
    summary.settings = msgspec.structs.replace(
        summary.settings, model=HOSTILE, trace=HOSTILE, prompts=HOSTILE
    )
    summary.notes = [HOSTILE]
    page = write_report(tmp_path, summary, [run], schedule).read_text("utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and "script" not in tags.names
    assert page.count("&lt;script&gt;") > 4
    assert {path.parent for path in tmp_path.rglob("*.svg")} == {tmp_path / "plots"}
    for path in (tmp_path / "plots").glob("*.svg"):
        assert "<script" not in path.read_text("utf-8")


def test_each_drawing_has_files_and_those_of_an_older_run_go(tmp_path: Path) -> None:
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "timeline-gone.svg").write_text("old")
    write_report(tmp_path, *scene(("full", "morph"), seconds=10))
    names = {path.stem for path in plots.iterdir()}
    assert {"overview", "distributions", "timeline-full", "timeline-morph"} <= names
    assert "timeline-gone" not in names
    for name in names:
        picture = (plots / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
        title = ElementTree.parse(plots / f"{name}.svg").find("{http://www.w3.org/2000/svg}title")
        assert title is not None and title.text


def test_a_long_comparison_makes_a_page_of_sane_size() -> None:
    page = page_of(*scene(("full", "morph"), seconds=300, per_second=5.7, num_layers=32))
    assert len(page.encode()) < 1_000_000  # so that six policies stay under 3 MB


# Contrast as WCAG defines it, of every text against the nearest background behind it.
PROBE = """
<script>
addEventListener("load", () => {
  const inner = document.querySelector("iframe").contentDocument;
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = channels(colour).slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let node = element; node; node = node.parentElement) {
      const colour = inner.defaultView.getComputedStyle(node).backgroundColor;
      if ((channels(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  let worst = 99, where = "", number = 0;
  for (const element of inner.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || element.closest("style")) continue;
    const style = inner.defaultView.getComputedStyle(element);
    const front = light(element.closest("svg") ? style.fill : style.color);
    const back = light(behind(element));
    const contrast = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    number += 1;
    if (contrast < worst) { worst = contrast; where = element.textContent.slice(0, 40); }
  }
  const found = { worst, where, number, width: inner.documentElement.scrollWidth,
    page: inner.defaultView.getComputedStyle(inner.body).backgroundColor };
  document.querySelector("pre").textContent = JSON.stringify(found);
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize(
    ("scheme", "background"), [(1, "rgb(246, 245, 241)"), (0, "rgb(19, 19, 18)")]
)
@pytest.mark.parametrize("width", [420, 1360])
def test_a_browser_shows_it(
    page: str, tmp_path: Path, scheme: int, background: str, width: int
) -> None:
    assert BROWSER is not None
    quoted = page.replace("&", "&amp;").replace('"', "&quot;")
    style = f"<style>:root{{color-scheme:light dark}}iframe{{border:0;width:{width}px}}</style>"
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<!doctype html><meta charset="utf-8">{style}{PROBE}<pre></pre>'
        f'<iframe srcdoc="{quoted}"></iframe>',
        "utf-8",
    )
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    options += [f"--blink-settings=preferredColorScheme={scheme}", "--enable-logging=stderr"]
    done = subprocess.run(
        [BROWSER, *options, "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    told = re.search(r"<pre>(\{.*?\})</pre>", done.stdout)
    assert told is not None, done.stderr
    found = json.loads(told[1])
    assert found["page"] == background and found["number"] > 400
    assert found["width"] <= width
    assert found["worst"] >= 4.5, found["where"]
