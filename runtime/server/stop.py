"""Stop strings in text that arrives piece by piece."""

from collections.abc import Sequence


class StopFinder:
    """Passes text on, except what could be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the stop string that was met is part of the text."""
        self._stops = stops
        self._include = include
        self._held = ""
        self.found = False  # nothing follows once a stop string has been met

    def add(self, text: str) -> str:
        """The text that is safe to send now, cut at the first stop string."""
        text = self._held + text
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            self.found = True
            self._held = ""
            at, stop = min(hits, key=lambda hit: hit[0])
            return text[: at + len(stop)] if self._include else text[:at]
        safe = len(text) - self._num_held(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        text, self._held = self._held, ""
        return text

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
