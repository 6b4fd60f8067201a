"""`morph serve` on a terminal: its view comes and goes, the server and the terminal stay whole."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import serve_on_terminal

DEADLINE_S = 60.0


class Terminal:
    """A server on a terminal of its own; `seen` is what has been written there."""

    def __init__(self, become: str) -> None:
        self.fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.modes = termios.tcgetattr(theirs)
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", become, str(serve_on_terminal.__file__)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color"},
        )
        self._theirs = theirs  # open, so that modes can be read when the server is gone

    def wait_for(self, pattern: str) -> re.Match[bytes]:
        """Waits until it is written, after what was waited for before."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := re.search(pattern.encode(), self.seen)):
            assert time.monotonic() < deadline, self.seen[-2000:]
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 1 << 16)
        self.seen = self.seen[found.end() :]
        return found

    def press(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def is_sane(self) -> bool:
        return termios.tcgetattr(self._theirs) == self.modes

    def end(self) -> int:
        """The exit code, read while the terminal is drained."""
        deadline = time.monotonic() + DEADLINE_S
        while (code := self.process.poll()) is None:
            assert time.monotonic() < deadline, self.seen[-2000:]
            if select.select([self.fd], [], [], 0.05)[0]:
                self.seen += os.read(self.fd, 1 << 16)
        return code

    def view(self) -> int:
        """The process id of the view."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        views = [
            int(pid)
            for pid in children.split()
            if b"\0top\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(views) == 1
        return views[0]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.fd)
        os.close(self._theirs)


# The terminal becomes the one that keys and hang-ups come from.
_BECOME_SESSION = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, sys.argv[1]])"
)
# The server is not the job that the terminal belongs to, as after `morph serve ... &`.
_BECOME_BACKGROUND = (
    "import fcntl, os, signal, subprocess, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "server = subprocess.Popen([sys.executable, sys.argv[1]], process_group=0); "
    "signal.signal(signal.SIGTERM, lambda *_: server.terminate()); "
    "ended = os.waitpid(server.pid, os.WUNTRACED)[1]; "
    "os.WIFSTOPPED(ended) and server.kill(); sys.exit(ended and 9)"
)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal(_BECOME_SESSION)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.fixture
def background() -> Iterator[Terminal]:
    terminal = Terminal(_BECOME_BACKGROUND)
    try:
        yield terminal
    finally:
        terminal.close()


def test_a_server_in_the_background_shows_its_log_and_no_view(background: Terminal) -> None:
    url = background.wait_for(r"serving demo on (http://[\d.:]+)")[1].decode()
    background.wait_for(r"demote: layer 1 to INT4")
    assert answers(url) and background.is_sane()
    background.process.send_signal(signal.SIGTERM)
    background.wait_for(r"stopping: 0 requests to finish")
    assert background.end() == 0


def serving(terminal: Terminal) -> str:
    """The URL, once the view is to be seen."""
    url = terminal.wait_for(r"serving demo on (http://[\d.:]+)")[1].decode()
    terminal.wait_for(r"KV blocks")
    assert not terminal.is_sane()  # keys come one by one now
    return url


def answers(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
        return bool(answer.status == 200)


def test_the_view_closes_and_the_server_goes_on_with_its_log(terminal: Terminal) -> None:
    url = serving(terminal)
    terminal.press(b"q")
    terminal.wait_for(r"demote: layer 1 to INT4")  # what was logged meanwhile
    terminal.wait_for(r"the view is closed; the server goes on")
    assert terminal.is_sane() and answers(url)
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for(r"stopping: 0 requests to finish")
    assert terminal.end() == 0
    assert b"earlier lines are left out" not in terminal.seen


def test_ctrl_c_in_the_view_ends_the_server(terminal: Terminal) -> None:
    serving(terminal)
    terminal.press(b"\x03")
    terminal.wait_for(r"stopping: 0 requests to finish")
    assert terminal.end() == 0 and terminal.is_sane()


def test_a_killed_view_leaves_server_and_terminal_whole(terminal: Terminal) -> None:
    url = serving(terminal)
    os.kill(terminal.view(), signal.SIGKILL)
    terminal.wait_for(re.escape("\x1b[?1049l"))
    terminal.wait_for(r"the view ended with exit code -9; the server goes on")
    assert terminal.is_sane() and answers(url)


def test_sigterm_closes_the_view_first(terminal: Terminal) -> None:
    serving(terminal)
    terminal.process.send_signal(signal.SIGTERM)
    terminal.wait_for(r"stopping: 0 requests to finish")
    assert terminal.end() == 0 and terminal.is_sane()


@pytest.mark.parametrize("size", [(1, 1), (24, 80), (60, 200)])
def test_the_terminal_may_change_its_size(terminal: Terminal, size: tuple[int, int]) -> None:
    url = serving(terminal)
    fcntl.ioctl(terminal.fd, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    os.kill(terminal.view(), signal.SIGWINCH)
    terminal.press(b"q")
    terminal.wait_for(r"the view is closed")
    assert terminal.is_sane() and answers(url)


def test_the_view_gets_keys_by_its_environment_alone(terminal: Terminal) -> None:
    serving(terminal)
    view = Path(f"/proc/{terminal.view()}")
    assert b"secret" not in (view / "cmdline").read_bytes()
    assert b"MORPH_API_KEY=secret" in (view / "environ").read_bytes()
