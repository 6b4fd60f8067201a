"""What the HTTP process can carry, on an engine that costs next to nothing.

    python tests/benchmarks/http_process.py [--seconds N]

Requests per second of short whole answers, tokens per second of 64 streams and the pieces that they
come in, time to the first byte, and 1,000 streams at once. Clients run on the same machine, in
processes of their own.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from morphserve.morphcli.bench.http import HttpError, ServerSentEvents, post_stream

SERVER = Path(__file__).resolve().parents[1] / "support" / "serve_fake_engine.py"


@dataclass(slots=True)
class Seen:
    """By one client process."""

    answers: int = 0
    failures: int = 0
    pieces: int = 0
    first_s: list[float] = field(default_factory=list)
    seconds: float = 0.0


def run_clients(url: str, count: int, seconds: float, max_tokens: int, stream: bool) -> Seen:
    """`count` clients in a closed loop; each begins no request after `seconds`."""
    return asyncio.run(_run(url, count, seconds, max_tokens, stream))


async def _run(url: str, count: int, seconds: float, max_tokens: int, stream: bool) -> Seen:
    seen, started = Seen(), time.monotonic()
    body = json.dumps({"prompt": [5], "max_tokens": max_tokens, "stream": stream}).encode()

    async def client() -> None:
        while time.monotonic() - started < seconds:
            await _ask(url, body, stream, seen)

    await asyncio.gather(*(client() for _ in range(count)))
    seen.seconds = time.monotonic() - started
    return seen


async def _ask(url: str, body: bytes, stream: bool, seen: Seen) -> None:
    sent = time.monotonic()
    try:
        async with post_stream(url, "/v1/completions", body) as answer:
            if answer.status != 200:
                seen.failures += 1
                return
            seen.first_s.append(time.monotonic() - sent)
            if stream:
                async for _ in ServerSentEvents(answer):
                    seen.pieces += 1
            else:
                await answer.read()
            seen.answers += 1
    except (OSError, HttpError):
        seen.failures += 1


def measure(
    url: str, name: str, count: int, seconds: float, tokens: int, stream: bool
) -> list[str]:
    with ProcessPoolExecutor(1) as pool:
        seen = pool.submit(run_clients, url, count, seconds, tokens, stream).result()
    first = sorted(seen.first_s) or [float("nan")]
    p50, p99 = (first[int(share * (len(first) - 1))] * 1000 for share in (0.5, 0.99))
    return [
        name,
        f"{seen.answers / seen.seconds:.0f}",
        f"{seen.answers * tokens / seen.seconds:.0f}",
        f"{seen.pieces / seen.seconds:.0f}" if stream else "–",
        f"{p50:.1f} / {p99:.1f} ms",
        str(seen.failures),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    command = [sys.executable, SERVER, "--max-queued", "2000"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = _address(server)
        table = Table("case", "answers/s", "tokens/s", "pieces/s", "first byte p50 / p99", "failed")
        table.add_row(*measure(url, "1 client, whole, 1 token", 1, seconds, 1, False))
        table.add_row(*measure(url, "32 clients, whole, 1 token", 32, seconds, 1, False))
        table.add_row(*measure(url, "64 streams of 200 tokens", 64, seconds, 200, True))
        table.add_row(*measure(url, "1,000 streams of 50 tokens", 1000, seconds, 50, True))
    finally:
        server.terminate()
        server.wait()
    table.caption = f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f}"
    Console().print(table)


def _address(server: "subprocess.Popen[str]") -> str:
    assert server.stderr is not None
    for line in server.stderr:
        if match := re.search(r"serving demo on (http://\S+)", line):
            return match[1]
    raise RuntimeError("the server did not start")


if __name__ == "__main__":
    main()
