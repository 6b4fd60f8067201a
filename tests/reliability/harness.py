"""A server under test, a plain HTTP client for it, and the table of rules it must keep."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from morphserve.morphcli.bench.http import HttpError, ServerSentEvents, post_stream
from morphserve.morphcli.bench.server import free_port, get

HERE = Path(__file__).resolve().parent
START_S = 120.0  # the first start compiles kernels


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
        page = os.sysconf("SC_PAGE_SIZE")
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids()]
        return sum(pages) * page / 2**20

    def num_fds(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())

    def await_idle(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """The state once nothing runs or waits and every block is free."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.state()
            if not (state["running"] or state["waiting"] or state["blocks_used"]):
                return state
            assert time.monotonic() < deadline, f"not idle after {timeout_s:g} s: {state}"
            time.sleep(0.02)


@contextlib.contextmanager
def serving(
    arguments: Sequence[str] = (),
    *,
    log: Path,
    environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Iterator[Server]:
    """`morph serve demo` with these arguments; `before` runs in its process, before it starts."""
    port = free_port()
    start = [sys.executable, "-m", "morphserve.morphcli", "serve", "demo", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*start, "--no-monitor", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            preexec_fn=before,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        _await_health(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def _await_health(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()
        with contextlib.suppress(OSError):
            if get(server.url, "/health")[0] == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server did not start: {server.log.read_text()}")


@dataclass(slots=True)
class Answer:
    """What one request came to."""

    status: int  # 0: no answer
    first_s: float | None = None  # to the status of a refusal, or to the first token
    total_s: float = 0.0
    num_chunks: int = 0
    gaps_s: list[float] = field(default_factory=list)  # between tokens
    finished: bool = False  # to the end, or refused in full
    error: str | None = None
    retry_after: str | None = None


async def complete(url: str, **fields: Any) -> Answer:
    """One streamed completion."""
    body = json.dumps({"prompt": "def ", "stream": True, "temperature": 0} | fields).encode()
    started = time.monotonic()
    answer = Answer(0)
    try:
        async with post_stream(url, "/v1/completions", body) as response:
            answer.status = response.status
            if answer.status != 200:
                answer.error = (await response.read()).decode(errors="replace")
                answer.first_s, answer.finished = time.monotonic() - started, True
            else:
                await _read_stream(ServerSentEvents(response), answer, started)
    except (OSError, HttpError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.total_s = time.monotonic() - started
    return answer


async def _read_stream(events: ServerSentEvents, answer: Answer, started: float) -> None:
    before = started
    async for data in _data(events):
        now = time.monotonic()
        if data == b"[DONE]":
            answer.finished = True
            return
        if b'"error"' in data[:10]:
            answer.error = data.decode()
            return
        if answer.first_s is None:
            answer.first_s = now - started
        else:
            answer.gaps_s.append(now - before)
        before = now
        answer.num_chunks += 1


async def _data(events: ServerSentEvents) -> AsyncIterator[bytes]:
    async for data in events:
        yield data


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

    def show(self) -> int:
        """Prints the table; the exit code: 1 if a rule was broken."""
        table = Table("", "rule", "seen", "")
        for name, promise, seen, holds in self.rows:
            table.add_row(name, promise, seen, "[green]holds[/]" if holds else "[red]BROKEN[/]")
        load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
        table.caption = f"load average {load}; {os.cpu_count()} cores"
        Console(width=150).print(table)
        return 0 if all(holds for *_, holds in self.rows) else 1


async def gather(*works: Any) -> list[Any]:
    return list(await asyncio.gather(*works))
