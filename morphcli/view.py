"""`morph top` on a server's own terminal, as a process of its own, and the log meanwhile."""

import asyncio
import atexit
import contextlib
import os
import signal
import sys
import termios
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from morphserve.runtime.server.logs import say
from morphserve.runtime.server.run import Watch

if TYPE_CHECKING:
    from morphserve.runtime.server.serving import Serving

INTERRUPTED = 130  # exit code of a view that was closed with Ctrl-C
VIEW_COMMAND = (sys.executable, "-P", "-m", "morphserve.morphcli", "top")
_MARK = b"\0\n"  # in stderr: what comes after it is held
_KEPT_LINES = 200  # of what is written while the view is open
_END_S = 2.0  # from the wish that the view ends to its end
# Leaves the other screen, shows the cursor, ends reports of mouse, focus and pasting.
_SANE = b"\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?1003l\x1b[?1006l\x1b[?1004l\x1b[?2004l\x1b[0m"


def choose_watch(
    no_monitor: bool, log_interval_s: float, keys: Mapping[str, str] | None = None
) -> Watch:
    """The live view if the terminal is ours and nobody declined it, else log lines.

    `keys` are environment variables with which the view may ask the server.
    """
    if no_monitor or not (os.isatty(0) and os.isatty(2) and _is_in_foreground()):
        return lambda serving: _watch_log(serving, log_interval_s)
    log = HeldLog()
    return lambda serving: _watch(serving, log, log_interval_s, keys or {})


def _is_in_foreground() -> bool:
    """Whether the terminal is ours: a job in the background that reads from it is stopped."""
    with contextlib.suppress(OSError):
        return os.tcgetpgrp(0) == os.getpgrp()
    return False


async def _watch_log(serving: "Serving", interval_s: float) -> None:
    from morphserve.morphcli.monitor import watch_log  # what it needs is imported by now

    await watch_log(serving, interval_s)


async def _watch(
    serving: "Serving", log: "HeldLog", log_interval_s: float, keys: Mapping[str, str]
) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch_log(serving, log_interval_s))
        if not _is_in_foreground():
            return  # put into the background while it loaded
        viewing = group.create_task(show_view([*VIEW_COMMAND, serving.url], log, keys))
        stopping = group.create_task(serving.stopping.wait())
        await asyncio.wait((viewing, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not viewing.done():
            viewing.cancel()  # the log goes on
            return
        stopping.cancel()
        code = viewing.result()
        if code == INTERRUPTED:
            os.kill(os.getpid(), signal.SIGINT)  # as if there had been no view
        elif code:
            say("start", f"the view ended with exit code {code}; the server goes on")
        else:
            say("start", "the view is closed; the server goes on, Ctrl-C ends it")


async def show_view(command: Sequence[str], log: "HeldLog", keys: Mapping[str, str]) -> int:
    """The view's exit code. However it ends, the terminal is as it was and the log goes on."""
    modes = termios.tcgetattr(0)
    log.hold()
    try:
        view = await asyncio.create_subprocess_exec(
            *command, stdout=log.terminal, stderr=log.terminal, env=os.environ | keys
        )
        try:
            return await view.wait()
        finally:
            await _end(view)
    finally:
        _restore(log.terminal, modes)
        log.release()


def _restore(terminal: int, modes: list[Any]) -> None:
    # A job in the background may do this only while it ignores the signal.
    stopper = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        with contextlib.suppress(termios.error, OSError):  # the terminal may be gone
            termios.tcsetattr(0, termios.TCSANOW, modes)
            os.write(terminal, _SANE)
    finally:
        signal.signal(signal.SIGTTOU, stopper)


async def _end(view: asyncio.subprocess.Process) -> None:
    if view.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        view.terminate()
    try:
        await asyncio.wait_for(view.wait(), _END_S)
    except TimeoutError:
        view.kill()
        await view.wait()


class HeldLog:
    """Takes over stderr, for the engine's process too, and keeps it back while a view is open."""

    def __init__(self) -> None:
        self.terminal = os.dup(2)
        os.set_inheritable(self.terminal, False)
        self._held: deque[bytes] | None = None  # lines; None: they go to the terminal at once
        self._num_held = 0
        self._lock = threading.Lock()
        self._is_holding = threading.Event()
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.close(writer)
        self._pump = threading.Thread(target=self._run, args=[reader], daemon=True)
        self._pump.start()
        atexit.register(self.close)

    def hold(self) -> None:
        """Keeps back what is written from now on; what was written before is shown."""
        self._is_holding.clear()
        os.write(2, _MARK)
        self._is_holding.wait(_END_S)

    def release(self) -> None:
        """Shows what was kept back, and from now on everything at once."""
        with self._lock:
            if self._held is None:
                return
            held, self._held = self._held, None
            if left_out := self._num_held - len(held):
                self._show(f"({left_out} earlier lines are left out)\n".encode())
            for line in held:
                self._show(line)

    def close(self) -> None:
        """Gives stderr back, with everything that was written to it shown."""
        os.dup2(self.terminal, 2)
        self._pump.join(timeout=1.0)  # it ends when no process writes any more
        self.release()

    def _run(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as stream:
            rest = b""
            while data := stream.read(1 << 16):
                *lines, rest = (rest + data).splitlines(keepends=True) or [b""]
                if rest.endswith(b"\n"):
                    lines, rest = [*lines, rest], b""
                self._take(lines)
            self._take([rest] if rest else [])

    def _take(self, lines: Sequence[bytes]) -> None:
        with self._lock:
            for line in lines:
                if line.endswith(_MARK):
                    self._held, self._num_held = deque(maxlen=_KEPT_LINES), 0
                    self._is_holding.set()
                elif self._held is None:
                    self._show(line)
                else:
                    self._held.append(line)
                    self._num_held += 1

    def _show(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(self.terminal, line)
