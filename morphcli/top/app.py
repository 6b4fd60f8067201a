"""The live view: its layout, its keys, and how often it looks."""

import asyncio
import os
import signal
import time
from collections.abc import Callable

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal
from textual.events import Resize
from textual.widget import Widget

from morphserve.morphcli.top import panels
from morphserve.morphcli.top.feeds import CannotAct, Feed
from morphserve.morphcli.top.help import HELP, KEYS, Help
from morphserve.morphcli.top.history import History
from morphserve.runtime.messages import Event
from morphserve.runtime.server.state import State

INTERRUPTED = 130  # exit code after Ctrl-C
_REFRESH_S = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
_WIDE, _TALL = 140, 36  # from here on both lower panes; room between the parts
_SEEK_S = 5.0
_KINDS: dict[str, tuple[str, ...]] = {  # of events; none: all
    "all": (),
    "decisions": ("decision", "pin"),
    "swaps": ("demote", "promote", "swap_failed"),
    "trouble": ("preempt", "swap_failed", "error", "engine"),
}
Draw = Callable[[int, int], Text]  # into so many columns and lines


class Panel(Widget):
    """A part of the view, drawn into whatever room it has."""

    def __init__(self, name: str, draw: Draw) -> None:
        super().__init__(id=name)
        self._draw = draw

    def render(self) -> Text:
        return self._draw(max(1, self.size.width), max(1, self.size.height))


class Top(App[int]):
    """Shows a feed until `q`; returns the exit code."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { layout: vertical; padding: 0 1; background: #0d1117; color: #e6edf3; }
    #header, #memory { height: 2; }
    #layers { height: 2; }
    #kv { height: 1fr; min-height: 3; }
    #middle, #traffic, #latency { height: 4; }
    #traffic, #events, #requests { width: 1fr; }
    #latency { width: 39; margin-left: 2; }
    #bottom { height: 1fr; min-height: 2; }
    #events, #requests { height: 100%; }
    #footer { height: 1; color: #8b949e; }
    .tall #layers, .tall #kv, .tall #middle, .tall #memory, .tall #bottom { margin-top: 1; }
    .wide #requests { margin-left: 2; }
    .hidden { display: none; }
    """
    BINDINGS = [
        Binding("q", "quit_view", "quit"),
        Binding("ctrl+c", "interrupt", "interrupt", priority=True),
        Binding("question_mark,h", "help", "help"),
        Binding("space", "pause", "pause"),
        Binding("tab", "panes", "panes", priority=True),
        Binding("l", "order", "layer order"),
        Binding("e", "kinds", "events"),
        Binding("plus,equals_sign", "faster(1)", "faster"),
        Binding("minus", "faster(-1)", "slower"),
        Binding("left", "seek(-1)", "back"),
        Binding("right", "seek(1)", "on"),
        Binding("d", "step(1)", "one rung down"),
        Binding("u", "step(-1)", "one rung up"),
        Binding("p", "pin", "pin"),
        Binding("a", "free", "free"),
    ]

    def __init__(self, feed: Feed) -> None:
        super().__init__()
        self.feed = feed
        self.state: State | None = None
        self._history = History()
        self._refresh = _REFRESH_S.index(0.25)
        self._paused = False
        self._by_ladder = True
        self._kinds = "all"
        self._pane = "events"  # the one that narrow terminals show
        self._looked_s = time.monotonic()
        self._panels = {name: Panel(name, draw) for name, draw in self._draws().items()}

    def _draws(self) -> dict[str, Draw]:
        """What each part of the view shows; most show nothing until there is a state."""
        with_state: dict[str, Callable[[State, int, int], Text]] = {
            "layers": lambda s, w, h: panels.layer_map(s, self._by_ladder, w),
            "kv": lambda s, w, h: panels.kv(s, self._history.last(w), w, h),
            "memory": lambda s, w, h: panels.memory(s, w),
            "traffic": lambda s, w, h: panels.traffic(s, self._history.last(w), w),
            "latency": lambda s, w, h: panels.latency(s, w),
            "events": self._events,
            "requests": lambda s, w, h: panels.requests(s.requests, w, h),
        }
        footer = Text(KEYS, no_wrap=True, overflow="ellipsis")
        always: dict[str, Draw] = {"header": self._header, "footer": lambda w, h: footer}
        return always | {name: self._if_any(draw) for name, draw in with_state.items()}

    def compose(self) -> ComposeResult:
        parts = self._panels
        yield from (parts[name] for name in ("header", "layers", "kv", "memory"))
        yield Horizontal(parts["traffic"], parts["latency"], id="middle")
        yield Horizontal(parts["events"], parts["requests"], id="bottom")
        yield parts["footer"]

    def on_mount(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self.action_interrupt)
        loop.add_signal_handler(signal.SIGTERM, self.exit, 128 + signal.SIGTERM)
        # The terminal is gone: nothing to restore, and nowhere to write it to.
        loop.add_signal_handler(signal.SIGHUP, os._exit, 128 + signal.SIGHUP)
        self._arrange()
        self.run_worker(self._watch())

    def on_unmount(self) -> None:
        self.feed.close()

    def on_resize(self, _event: Resize) -> None:
        self.call_after_refresh(self._arrange)  # only then it has its new size

    async def look(self) -> None:
        """Takes what is new and shows it."""
        now = time.monotonic()
        seconds, self._looked_s = now - self._looked_s, now
        if not self._paused:
            for state in await self.feed.look(seconds):
                self._history.add(state)
                self.state = state
            self._layers_height()
        self._redraw()

    async def _watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_REFRESH_S[self._refresh])

    def action_quit_view(self) -> None:
        self.exit(0)

    def action_interrupt(self) -> None:
        self.exit(INTERRUPTED)

    def action_help(self) -> None:
        self.push_screen(Help(HELP))

    def action_pause(self) -> None:
        self._paused = not self._paused
        self._redraw()

    def action_panes(self) -> None:
        self._pane = "requests" if self._pane == "events" else "events"
        self._arrange()

    def action_order(self) -> None:
        self._by_ladder = not self._by_ladder
        self._redraw()

    def action_kinds(self) -> None:
        names = list(_KINDS)
        self._kinds = names[(names.index(self._kinds) + 1) % len(names)]
        self._redraw()

    def action_faster(self, by: int) -> None:
        self._refresh = min(max(0, self._refresh - by), len(_REFRESH_S) - 1)
        self._redraw()

    async def action_seek(self, direction: int) -> None:
        if self.feed.seek(direction * _SEEK_S):
            self._history = History()
            self._looked_s = time.monotonic()
            for state in await self.feed.look(0.0):
                self._history.add(state)
                self.state = state
            self._redraw()

    async def action_step(self, by: int) -> None:
        await self._act("step", {"by": by}, f"one rung {'down' if by > 0 else 'up'}")

    async def action_pin(self) -> None:
        if self.state is not None:
            rung = self.state.target_rung
            await self._act("pin", {"rung": rung}, f"rung {rung} is held until `a`")

    async def action_free(self) -> None:
        await self._act("free", {}, "the controller decides")

    async def _act(self, action: str, body: dict[str, int], done: str) -> None:
        try:
            await self.feed.act(action, body)
        except CannotAct as error:
            self.notify(str(error), severity="warning", markup=False)
        else:
            self.notify(done, markup=False)

    def _arrange(self) -> None:
        wide, tall = self.size.width >= _WIDE, self.size.height >= _TALL
        self.set_class(wide, "wide").set_class(tall, "tall")
        for name in ("events", "requests"):
            self._panels[name].set_class(not wide and name != self._pane, "hidden")
        self._layers_height()
        self._redraw()

    def _layers_height(self) -> None:
        """As many lines as the map of all layers takes."""
        if self.state is not None:
            shown = panels.layer_map(self.state, self._by_ladder, max(1, self.size.width - 2))
            lines = shown.plain.count("\n") + 1
            self._panels["layers"].styles.height = min(lines, max(1, self.size.height // 3))

    def _redraw(self) -> None:
        for panel in self._panels.values():
            panel.refresh()

    def _if_any(self, draw: Callable[[State, int, int], Text]) -> Draw:
        return lambda w, h: Text() if self.state is None else draw(self.state, w, h)

    def _header(self, width: int, _height: int) -> Text:
        notes = [self.feed.note, "paused" if self._paused else ""]
        notes.append(f"every {_REFRESH_S[self._refresh]:g} s" if self._refresh != 1 else "")
        note = "  ".join(filter(None, notes))
        if self.state is None:
            return Text(f"morph top\n{note}", no_wrap=True, overflow="ellipsis")
        return panels.header(self.state, note, width)

    def _events(self, state: State, width: int, height: int) -> Text:
        wanted = _KINDS[self._kinds]
        shown: list[Event] = [e for e in state.events if not wanted or e.kind in wanted]
        return panels.events(shown, self._kinds, width, height)
