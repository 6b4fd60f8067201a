"""A server under test, and the table of rules it must keep."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from morphserve.morphcli.bench.server import free_port, get

HERE = Path(__file__).resolve().parent
START_S = 120.0  # the first start compiles kernels
MAX_FILES = 8192  # of the clients
DEMO = (sys.executable, "-m", "morphserve.morphcli", "serve", "demo", "--no-monitor")
FAKE = (sys.executable, str(HERE.parent / "support" / "serve_fake_engine.py"))  # costs nothing


@dataclass(frozen=True, slots=True)
class Given:
    """What a trial works with."""

    folder: Path
    seconds: float  # of each load
    streams: int  # of a crowd


@dataclass
class Server:
    """A running `morph serve`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def state(self) -> dict[str, Any]:
        status, body = get(self.url, "/morph/v1/state")
        assert status == 200, body
        return dict(json.loads(body))

    def probe(self) -> float:
        """Seconds that `/health` takes on a connection of its own."""
        started = time.monotonic()
        assert get(self.url, "/health", timeout_s=30.0)[0] == 200
        return time.monotonic() - started

    def pids(self) -> list[int]:
        """Of the HTTP process, then of its children."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def rss_mib(self) -> float:
        """Memory of all its processes."""
        return sum(map(rss_mib, self.pids()))

    def num_threads(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self.pids())

    def num_fds(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())

    def await_health(self, path: str = "/health") -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                if get(self.url, path)[0] == 200:
                    return
            time.sleep(0.02)
        raise AssertionError(f"the server does not serve: {self.log.read_text()}")

    def await_running(self, count: int) -> None:
        deadline = time.monotonic() + START_S
        while self.state()["running"] != count:
            assert time.monotonic() < deadline, self.state()
            time.sleep(0.01)

    def await_idle(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """The state once nothing runs or waits and every block is free."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.state()
            if not (state["running"] or state["waiting"] or state["blocks_used"]):
                return state
            assert time.monotonic() < deadline, f"not idle after {timeout_s:g} s: {state}"
            time.sleep(0.02)


def launch(
    arguments: Sequence[str] = (),
    *,
    log: Path,
    command: Sequence[str] = DEMO,
    environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Server:
    """A server that may not serve yet; the caller ends it."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            preexec_fn=before,
        )
    return Server(process, f"http://127.0.0.1:{port}", log)


@contextlib.contextmanager
def serving(
    arguments: Sequence[str] = (),
    *,
    log: Path,
    command: Sequence[str] = DEMO,
    environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Iterator[Server]:
    """A server with these arguments; `before` runs in its process, before it starts."""
    server = launch(arguments, log=log, command=command, environment=environment, before=before)
    try:
        server.await_health()
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(20)
        server.process.kill()
        server.process.wait()


def make_bundle(folder: Path) -> Path:
    """Of the demo model, once for a folder."""
    bundle = folder / "demo.morph"
    if bundle.exists():
        return bundle
    command = [sys.executable, "-m", "morphserve.morphcli", "quantize", "demo", "-o", str(bundle)]
    subprocess.run([*command, "--method", "rtn", "--force"], check=True, capture_output=True)
    return bundle


def tight(bundle: Path) -> list[str]:
    """Arguments with which some dozen requests make layers swap."""
    return ["--bundle", str(bundle), "--memory-budget", "27MiB", "--max-model-len", "640"]


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def allow_files(count: int) -> None:
    """Lets this process hold so many connections, if the machine does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, count)), hard))


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30.0)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@dataclass(slots=True)
class Rules:
    """What was promised, what was seen, and whether it holds."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def check(self, name: str, promise: str, seen: str, holds: bool) -> None:
        self.rows.append((name, promise, seen, holds))
        print(f"  {'holds ' if holds else 'BROKEN'} {name}: {promise}: {seen}", flush=True)

    def show(self) -> int:
        """Prints the table; the exit code: 1 if a rule was broken."""
        table = Table("", "rule", "seen", "")
        for name, promise, seen, holds in self.rows:
            table.add_row(name, promise, seen, "[green]holds[/]" if holds else "[red]BROKEN[/]")
        load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
        table.caption = f"load average {load}; {os.cpu_count()} cores"
        Console(width=150).print(table)
        return 0 if all(holds for *_, holds in self.rows) else 1
