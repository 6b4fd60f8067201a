"""The live view as a user meets it: keys, sizes, a server that goes away, recordings."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from fake_state import encoded, make_state
from textual.pilot import Pilot

from morphserve.morphcli.top.app import INTERRUPTED, Panel, Top
from morphserve.morphcli.top.feeds import CannotAct, ReplayFeed
from morphserve.morphcli.top.recording import Recording
from morphserve.runtime.server.state import State

pytestmark = pytest.mark.anyio
EXPORTERS_OWN = "c5c8c6"  # of the frame that exporting draws


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeFeed:
    """Shows `state` at every look; None: the server is away."""

    def __init__(self, state: State | None, refusal: str = "") -> None:
        self.state, self.refusal = state, refusal
        self.note = ""
        self.looks = 0
        self.acts: list[tuple[str, dict[str, int]]] = []

    async def look(self, seconds: float) -> list[State]:
        self.looks += 1
        self.note = "" if self.state else "http://x does not answer; trying again"
        return [self.state] if self.state else []

    async def act(self, action: str, body: dict[str, int]) -> None:
        if self.refusal:
            raise CannotAct(self.refusal)
        self.acts.append((action, body))

    def seek(self, by_s: float) -> bool:
        return False

    def close(self) -> None:
        pass


def shown(app: Top, panel: str = "") -> str:
    """The text of a part of the view, or of all that is to be seen."""
    found = app.screen_stack[0].query(Panel)
    visible = [p for p in found if p.display and p.id == (panel or p.id)]
    return "\n".join(p.render().plain for p in visible)


async def after_a_look(pilot: Pilot[Any], app: Top) -> None:
    await app.look()
    await pilot.pause()


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
async def test_everything_that_matters_is_to_be_seen(size: tuple[int, int]) -> None:
    app = Top(FakeFeed(make_state()))
    async with app.run_test(size=size) as pilot:
        await after_a_look(pilot, app)
        text = shown(app)
        for part in (
            *("demo  policy balanced  up 1m 01s", "● ready  rung 2/4", "layers, least important"),
            *("█ 30 used  ─ 60 now = 1.50×", "memory ╬ static", "0 running  3 waiting"),
            *(
                "3 refused",
                "output tok/s   340",
                "TTFT ≤100ms",
                "500ms!",
                "layer 1 is int4",
                "q quit",
            ),
        ):
            assert part in text, part
        cut = re.sub(r"<[^>]+>", "", app.export_screenshot()).replace("&#160;", " ")
        for part in ("demo", "KV blocks", "memory", "TTFT", "layer 1 is int4", "q quit"):
            assert part in cut, part
        for panel in app.query(Panel):
            if panel.display:
                assert panel.region.bottom <= size[1] and panel.region.right <= size[0]
                assert panel.size.height >= 1


@pytest.mark.parametrize("size", [(1, 1), (10, 3), (40, 10), (300, 100)])
async def test_any_size_is_survived(size: tuple[int, int]) -> None:
    app = Top(FakeFeed(make_state()))
    async with app.run_test(size=size) as pilot:
        await after_a_look(pilot, app)
        await pilot.resize_terminal(80, 24)
        await after_a_look(pilot, app)
        await pilot.resize_terminal(*size)
        await after_a_look(pilot, app)
        assert app.is_running


async def test_without_colour_it_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = Top(FakeFeed(make_state()))
    async with app.run_test(size=(80, 24)) as pilot:
        await after_a_look(pilot, app)
        colours = set(re.findall(r"fill: #(\w{6})", app.export_screenshot())) - {EXPORTERS_OWN}
        assert all(c[:2] == c[2:4] == c[4:] for c in colours), colours
        assert "░" in shown(app, "layers") and "500ms!" in shown(app, "latency")


async def test_narrow_terminals_show_one_pane_and_tab_the_other() -> None:
    app = Top(FakeFeed(make_state()))
    async with app.run_test(size=(80, 24)) as pilot:
        await after_a_look(pilot, app)
        assert "layer 1 is int4" in shown(app) and "cmpl-a" not in shown(app)
        await pilot.press("tab")
        assert "layer 1 is int4" not in shown(app) and "cmpl-a" in shown(app)
        await pilot.resize_terminal(200, 60)
        await pilot.pause()
        assert "layer 1 is int4" in shown(app) and "cmpl-a" in shown(app)


async def test_keys_change_what_is_shown() -> None:
    app = Top(FakeFeed(make_state()))
    async with app.run_test(size=(80, 24)) as pilot:
        await after_a_look(pilot, app)
        assert "░ ▼ █ █" in shown(app, "layers")
        await pilot.press("l")
        assert "in the model's order █ ░ ▼ █" in shown(app, "layers")
        await pilot.press("e")
        assert "blocks wanted" in shown(app, "events") and "layer 1" not in shown(app, "events")
        await pilot.press("e")
        assert "layer 1 is int4" in shown(app, "events") and "wanted" not in shown(app, "events")
        await pilot.press("e")
        assert "preempted" in shown(app, "events") and "layer 1" not in shown(app, "events")
        await pilot.press("e", "plus")
        assert "every 0.1 s" in shown(app, "header")
        await pilot.press("minus", "minus")
        assert "every 0.5 s" in shown(app, "header")


async def test_help_opens_and_any_key_closes_it() -> None:
    app = Top(FakeFeed(make_state()))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("question_mark")
        await pilot.pause()
        assert len(app.screen_stack) == 2
        await pilot.press("x")
        await pilot.pause()
        assert len(app.screen_stack) == 1


async def test_a_pause_asks_the_server_nothing() -> None:
    feed = FakeFeed(make_state(running=1))
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        await after_a_look(pilot, app)
        await pilot.press("space")
        looks, feed.state = feed.looks, make_state(running=9)
        await after_a_look(pilot, app)
        assert feed.looks == looks
        assert "paused" in shown(app) and "1 running" in shown(app)
        await pilot.press("space")
        await after_a_look(pilot, app)
        assert "9 running" in shown(app)


async def test_a_server_that_goes_away_and_comes_back_is_told() -> None:
    feed = FakeFeed(None)
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        await after_a_look(pilot, app)
        assert "does not answer; trying again" in shown(app)
        feed.state = make_state(running=1)
        await after_a_look(pilot, app)
        assert "does not answer" not in shown(app) and "1 running" in shown(app)
        feed.state = None
        await after_a_look(pilot, app)
        assert "does not answer; trying again" in shown(app) and "1 running" in shown(app)


async def test_admin_keys_ask_the_server() -> None:
    feed = FakeFeed(make_state())
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        await after_a_look(pilot, app)
        await pilot.press("d", "u", "p", "a")
        await pilot.pause()
    assert feed.acts == [
        ("step", {"by": 1}),
        ("step", {"by": -1}),
        ("pin", {"rung": 2}),
        ("free", {}),
    ]


async def test_without_an_admin_key_they_say_what_to_do() -> None:
    app = Top(FakeFeed(make_state(), refusal="this needs the server's admin key"))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await after_a_look(pilot, app)
        await pilot.press("d")
        await pilot.pause()
        assert [n.message for n in app._notifications] == ["this needs the server's admin key"]


@pytest.mark.parametrize(("key", "code"), [("q", 0), ("ctrl+c", INTERRUPTED)])
async def test_leaving_tells_how(key: str, code: int) -> None:
    app = Top(FakeFeed(make_state()))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press(key)
    assert app.return_value == code


async def test_a_recording_is_played_and_sought_in(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    lines = [encoded(time=100.0 + 5 * i, running=i) for i in range(5)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    feed = ReplayFeed(Recording(path))
    app = Top(feed)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("space", "right")
        await pilot.pause()
        assert "1 running" in shown(app) and "of 20 s" in shown(app)
        await pilot.press("right", "right", "right", "right")
        await pilot.pause()
        assert "4 running" in shown(app) and "the end" in shown(app)
        await pilot.press("left")
        await pilot.pause()
        assert "3 running" in shown(app)


async def test_a_recording_goes_on_in_its_own_time(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    path.write_bytes(b"\n".join(encoded(time=100.0 + i, running=i) for i in range(5)))
    feed = ReplayFeed(Recording(path))
    assert [state.running for state in await feed.look(9.0)] == [0]  # the first look begins
    assert [state.running for state in await feed.look(1.0)] == [1]
    assert [state.running for state in await feed.look(2.0)] == [2, 3]
    await asyncio.sleep(0)
    assert [state.running for state in await feed.look(9.0)][-1] == 4
    assert feed.note == "recording 4 of 4 s, the end"
