"""The keys of the live view, and the page that explains them."""

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.events import Key
from textual.screen import ModalScreen
from textual.widgets import Static

KEYS = "q quit  ? help  space pause  tab pane  l layers  e events  +/- rate  udpa rung"
HELP = """\
q        quit (the server goes on)     ?      this page
space    pause                         + -    look more, less often
tab      events or requests            e      which events
l        layers: least important first, or in the model's order
← →      in a recording: 5 s back, 5 s on

With the admin key (--admin-key, MORPH_ADMIN_KEY):
d u      one rung down, up             p      hold this rung
a        let the controller decide

Layers   █ full  ▓ INT8  ░ INT4  ▼ on the way down  ▲ on the way up
KV       █ used  · free  ─ room now; ┤ on the left: full precision's, most
Latency  ! misses the server's objective

Any key closes this page."""


class Help(ModalScreen[None]):
    """A page over the view."""

    CSS = """
    Help { align: center middle; }
    #page { width: 76; max-width: 100%; height: auto; max-height: 100%; padding: 0 1;
            background: #161b22; border: round #8b949e; }
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="page"):
            yield Static(self._text, markup=False)

    def on_key(self, event: Key) -> None:
        event.stop()
        self.dismiss()
