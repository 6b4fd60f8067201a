"""Where the live view's states come from: a server, or a recording."""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from morphserve.morphcli.top.history import KEPT_S
from morphserve.morphcli.top.look import BadState, decode
from morphserve.morphcli.top.recording import Recording
from morphserve.morphcli.top.source import Away, Keys, Server
from morphserve.runtime.server.state import State


class CannotAct(Exception):
    """What a key asked for is not done; the message says what would help."""


class Feed(Protocol):
    """States as time goes on."""

    note: str  # what the user should know of it now; empty: all is well

    async def look(self, seconds: float) -> list[State]:
        """What came in the `seconds` since the last look; the last one is to be shown."""
        ...

    async def act(self, action: str, body: dict[str, int]) -> None:
        """Asks the server to `pin`, `step` or `free` the rung. Raises CannotAct."""
        ...

    def seek(self, by_s: float) -> bool:
        """Goes there; whether it can. The next look begins a new history."""
        ...

    def close(self) -> None: ...


class LiveFeed:
    """A server over HTTP; while it is away the note says so."""

    def __init__(self, url: str, keys: Keys) -> None:
        self.note = f"asking {url} ..."
        self._server = Server(url, keys)

    async def look(self, seconds: float) -> list[State]:
        try:
            state = decode(await asyncio.to_thread(self._server.state))
        except (Away, BadState) as error:
            self.note = f"{error}; trying again"
            return []
        self.note = ""
        return [state]

    async def act(self, action: str, body: dict[str, int]) -> None:
        if not self._server.keys.admin:
            raise CannotAct(
                "this needs the server's admin key: start with --admin-key, or set MORPH_ADMIN_KEY"
            )
        one_more = Server(self._server.url, self._server.keys)  # the other one may be busy
        try:
            await asyncio.to_thread(one_more.act, action, body)
        except Away as error:
            raise CannotAct(str(error)) from error
        finally:
            one_more.close()

    def seek(self, by_s: float) -> bool:
        return False

    def close(self) -> None:
        self._server.close()


@dataclass(slots=True)
class ReplayFeed:
    """A recording in its own time."""

    recording: Recording
    note: str = ""
    _is_new: bool = field(default=True, init=False)  # nothing has been shown since a jump

    async def look(self, seconds: float) -> list[State]:
        if not self._is_new:
            self.recording.seek(seconds)
        lines = self.recording.until_now(KEPT_S if self._is_new else seconds)
        self._is_new = False
        played, length = self.recording.played_s, self.recording.length_s
        end = ", the end" if self.recording.at_end else ""
        self.note = f"recording {played:.0f} of {length:.0f} s{end}"
        try:
            return [decode(line) for line in lines]
        except BadState as error:
            self.note = str(error)
            return []

    async def act(self, action: str, body: dict[str, int]) -> None:
        raise CannotAct("this is a recording: nothing can be changed in it")

    def seek(self, by_s: float) -> bool:
        self.recording.seek(by_s)
        self._is_new = True
        return True

    def close(self) -> None:
        pass
