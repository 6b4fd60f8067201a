"""Rude clients, files that vanish, little of everything: L4, L5, F10, F12, F13, F17."""

import asyncio
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from clients import Answer, closed_loop, complete, gather
from harness import (
    DEMO,
    Given,
    Rules,
    Server,
    connect,
    get,
    make_bundle,
    percentile,
    serving,
    tight,
)

SILENT_S = 20.0  # until the server closes a connection that says nothing


def stalled(rules: Rules, given: Given) -> None:
    """L4: connections that stop in the middle of a head or a body."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    body = head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with serving(["--policy", "off"], log=given.folder / "stalled.log") as server:
        for name, part in (("head", head), ("body", body)):
            connections = [connect(server) for _ in range(400)]
            for connection in connections:
                connection.sendall(part)
            probes = [server.probe() for _ in range(50)]
            started = time.monotonic()
            answers = [_until_closed(connection) for connection in connections]
            took = time.monotonic() - started
            right = sum(answer.startswith(b"HTTP/1.1 408") for answer in answers)
            p99 = percentile(probes, 0.99) * 1000
            rules.check(
                "L4",
                f"400 stalled in the {name}: a probe takes ≤ 100 ms",
                f"{p99:.0f} ms",
                p99 <= 100,
            )
            rules.check(
                "L4",
                f"400 stalled in the {name}: closed within 20 s with 408",
                f"{right} with 408, after {took:.1f} s",
                right == len(connections) and took <= SILENT_S + 2,
            )


def _until_closed(connection: socket.socket) -> bytes:
    connection.settimeout(60.0)
    received = b""
    with connection:
        try:
            while part := connection.recv(65536):
                received += part
        except OSError as error:
            return f"{error}".encode()
    return received


def few_descriptors(rules: Rules, given: Given) -> None:
    """L5: more connections than the process may have."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    with serving(["--policy", "off"], log=given.folder / "fds.log", before=limit) as server:
        connections = []
        for _ in range(2000):
            try:
                connections.append(connect(server))
            except OSError:
                break
        used = _cpu_seconds(server.process.pid)
        time.sleep(2.0)
        used = _cpu_seconds(server.process.pid) - used
        for connection in connections:
            connection.close()
        started = time.monotonic()
        answer = _eventually(lambda: asyncio.run(complete(server.url, max_tokens=4)))
        took = time.monotonic() - started
    seen = f"answers again after {took:.2f} s, {used:.2f} s of CPU in 2 s"
    promise = f"256 descriptors, {len(connections)} connections: no busy loop, answers after"
    rules.check("L5", promise, seen, answer.status == 200 and took < 2.0 and used < 1.0)


def _eventually(work: Callable[[], Answer]) -> Answer:
    for _ in range(100):
        answer = work()
        if answer.status == 200:
            break
        time.sleep(0.1)
    return answer


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def removed_bundle(rules: Rules, given: Given) -> None:
    """F10: bundle and checkpoint change on disk while they are served."""
    bundle = make_bundle(given.folder)
    with serving(tight(bundle), log=given.folder / "removed.log") as server:
        for path in bundle.glob("layer-*"):
            os.truncate(path, 100)
        shutil.rmtree(bundle)
        answers = asyncio.run(_burst(server, 24))
        state = server.await_idle()
        swaps = state["swaps"]
    finished = sum(answer.finished and answer.status == 200 for answer in answers)
    rules.check(
        "F10",
        "a bundle truncated and removed while served: swaps go on, all requests end",
        f"{finished} of {len(answers)} finished, {swaps} swaps",
        finished == len(answers) and swaps > 0,
    )


async def _burst(server: Server, count: int) -> list[Answer]:
    works = [
        complete(server.url, prompt=[5 + i] * 200, max_tokens=60, ignore_eos=True)
        for i in range(count)
    ]
    return await gather(*works)


def little_memory(rules: Rules, given: Given) -> None:
    """F12: a budget that cannot hold the model, and a process limit below the budget."""
    arguments = ["--policy", "off", "--memory-budget", "8MiB", "--port", "0"]
    small = subprocess.run([*DEMO, *arguments], capture_output=True, text=True)
    seen = small.stderr.strip().splitlines()[-1][:90]
    holds = small.returncode == 5 and "raise --memory-budget to" in small.stderr
    rules.check("F12", "a budget too small is refused at start with the number", seen, holds)


def busy_neighbour(rules: Rules, given: Given) -> None:
    """F13: another program on both cores."""
    with serving(["--policy", "off"], log=given.folder / "neighbour.log") as server:
        quiet = _throughput(server, given.seconds)
        stop = multiprocessing.Event()
        burners = [multiprocessing.Process(target=_burn, args=[stop]) for _ in range(2)]
        for burner in burners:
            burner.start()
        shared = _throughput(server, given.seconds)
        stop.set()
        for burner in burners:
            burner.join()
    rules.check(
        "F13",
        "two busy neighbours on two cores: throughput keeps at least a third",
        f"{quiet:.0f} tok/s alone, {shared:.0f} beside them ({shared / quiet:.0%})",
        shared >= quiet / 3,
    )


def _burn(stop: "multiprocessing.synchronize.Event") -> None:
    while not stop.is_set():
        sum(range(10_000))


def _throughput(server: Server, seconds: float) -> float:
    """Tokens per second of 16 streams in a closed loop."""
    seen = closed_loop(server.url, 16, seconds, prompt=[9] * 32, max_tokens=64, ignore_eos=True)
    return sum(64 * answer.done for answer in seen.answers) / seen.seconds


def watchers(rules: Rules, given: Given) -> None:
    """F17: metrics and state read a hundred times a second."""
    with serving(["--policy", "off"], log=given.folder / "watchers.log") as server:
        _throughput(server, 2.0)
        plain, watched = [], []
        for _ in range(3):  # in turns: other work on the machine meets both
            plain += asyncio.run(_gaps(server, given.seconds / 2))
            stop = threading.Event()
            thread = threading.Thread(target=_scrape, args=[server, stop])
            thread.start()
            watched += asyncio.run(_gaps(server, given.seconds / 2))
            stop.set()
            thread.join()
        fds = server.num_fds()
    before, after = percentile(plain, 0.5) * 1000, percentile(watched, 0.5) * 1000
    rules.check(
        "F17",
        "scrapes every 10 ms: the median gap between tokens grows by at most 5 %",
        f"{before:.2f} ms, {after:.2f} ms scraped; {fds} descriptors after",
        after <= 1.05 * before and fds < 80,
    )


def _scrape(server: Server, stop: threading.Event) -> None:
    while not stop.wait(0.01):
        get(server.url, "/metrics")


async def _gaps(server: Server, seconds: float) -> list[float]:
    """Of one stream, whose tokens are handed on one by one."""
    deadline, gaps = time.monotonic() + seconds, []
    while time.monotonic() < deadline:
        answer = await complete(server.url, prompt=[9] * 32, max_tokens=64, ignore_eos=True)
        gaps += answer.gaps_s
    return gaps
