"""What overload, faults and rude clients do to a server, with a verdict per rule. Run by hand:

    PYTHONPATH=.src:tests/support python tests/reliability/overload.py --server fake --quick
    PYTHONPATH=.src:tests/support python tests/reliability/overload.py --server demo --seconds 60

It starts its own server on loopback, on a free port, and ends it. `fake`: the HTTP process before
an engine that repeats prompts and takes as many at once as there are, so that its capacity is that
of the HTTP process and this client on the same cores; `demo`: the whole of `morph serve demo`. At
most MAX_REQUESTS requests are sent per rate, and none waits longer than PATIENCE_S. Exits with 1 if
a rule does not hold.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from morphserve.morphcli.bench.http import Answer, HttpError, ServerSentEvents

MAX_REQUESTS = 20_000
PATIENCE_S = 120.0
OUTPUT_TOKENS = 32
PROMPT = "def main():\n    return "


@dataclass
class Outcome:
    status: int = 0  # 0: no answer
    error: str = ""  # of a connection, or in a stream
    done: bool = False  # it ended with [DONE]
    retry_after: bool = False
    ttft_s: float = 0.0
    total_s: float = 0.0


@dataclass
class Server:
    process: asyncio.subprocess.Process
    url: str
    is_fake: bool  # its counts of blocks and waiting requests are made up

    @property
    def engine_pid(self) -> int:
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def num_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def sample(self) -> dict[str, int]:
        """Resident MiB of both processes."""
        return {"http": rss_mib(self.process.pid), "engine": rss_mib(self.engine_pid)}


def rss_mib(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


class Verdicts:
    """Rules with what was seen, printed as they are judged."""

    def __init__(self) -> None:
        self.failed = 0

    def judge(self, rule: str, holds: bool, seen: str) -> None:
        self.failed += not holds
        print(f"{'pass' if holds else 'FAIL'}  {rule:<58} {seen}", flush=True)


async def start(kind: str, *flags: str) -> Server:
    fake = str(Path(__file__).parents[1] / "support" / "serve_fake_engine.py")
    demo = ["-m", "morphserve.morphcli", "serve", "demo", "--policy", "off", "--no-monitor"]
    command = [fake] if kind == "fake" else [*demo, "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, *flags, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    while line := (await process.stderr.readline()).decode():
        if line.startswith("serving "):
            asyncio.create_task(forward(process.stderr))
            return Server(process, line.split()[-1], kind == "fake")
    raise SystemExit("the server did not start")


async def forward(log: asyncio.StreamReader) -> None:
    """The server's log would fill its pipe."""
    while await log.read(1 << 16):
        pass


async def get(server: Server, path: str) -> tuple[int, str]:
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read(-1)).decode().partition("\r\n\r\n")
        return int(head.split()[1]), body
    finally:
        writer.close()


async def state(server: Server) -> dict[str, object]:
    answer: dict[str, object] = json.loads((await get(server, "/morph/v1/state"))[1])
    return answer


class Head(Answer):
    """An answer with its headers."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.headers: dict[str, str] = {}
        super().__init__(reader)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()


async def ask(
    server: Server, tokens: int = OUTPUT_TOKENS, pause_s: float = 0.0, leave_after: int = 0
) -> Outcome:
    """One stream; `pause_s` between its events, left after so many of them (0: never)."""
    outcome, started = Outcome(), time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await _ask(server, outcome, started, tokens, pause_s, leave_after)
    except (OSError, HttpError, TimeoutError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.total_s = time.monotonic() - started
    return outcome


async def _ask(
    server: Server, outcome: Outcome, started: float, tokens: int, pause_s: float, leave_after: int
) -> None:
    fields = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
    body = json.dumps(fields | {"ignore_eos": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}"
        writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
        answer = Head(reader)
        await answer.read_head()
        outcome.status = answer.status
        outcome.retry_after = answer.headers.get("retry-after", "").isdigit()
        if answer.status != 200:
            outcome.error = (await answer.read()).decode()
            return
        num_events = 0
        async for data in ServerSentEvents(answer):
            num_events += 1
            outcome.ttft_s = outcome.ttft_s or time.monotonic() - started
            outcome.done = outcome.done or data == b"[DONE]"
            if b'"error"' in data:
                outcome.error = data.decode()
            if num_events == leave_after:
                return
            if pause_s:
                await asyncio.sleep(pause_s)
    finally:
        writer.close()


async def capacity(server: Server, seconds: float) -> float:
    """Requests per second that 64 clients get answered, each asking again at once."""
    end, finished = time.monotonic() + seconds, 0

    async def client() -> None:
        nonlocal finished
        while time.monotonic() < end:
            outcome = await ask(server)
            finished += outcome.done

    started = time.monotonic()
    await asyncio.gather(*(client() for _ in range(64)))
    return finished / (time.monotonic() - started)


async def offer(server: Server, rate: float, seconds: float) -> list[Outcome]:
    """Open loop: Poisson arrivals at `rate` per second, whatever becomes of them."""
    tasks, random_, due = [], random.Random(0), time.monotonic()
    end = due + seconds
    while due < end and len(tasks) < MAX_REQUESTS:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(ask(server)))
        due += random_.expovariate(rate)
    return await asyncio.gather(*tasks)


async def idle(server: Server) -> bool:
    """Whether nothing is running, waiting or held soon after everybody left."""
    for _ in range(100):
        now = await state(server)
        held = 0 if server.is_fake else (now["waiting"] or now["blocks_used"])
        if not (now["running"] or held):
            return True
        await asyncio.sleep(0.05)
    return False


def p99_ms(seconds: list[float]) -> float:
    return sorted(seconds)[max(0, -(-99 * len(seconds) // 100) - 1)] * 1e3 if seconds else 0.0


async def overload(kind: str, seconds: float, verdicts: Verdicts) -> None:
    server = await start(kind, *flags(kind, 64))
    first_rss, files = server.sample(), server.num_files()
    rate = await capacity(server, seconds)
    print(f"capacity {rate:.1f} requests/s; MiB at first {first_rss}")
    goodput, refused = {}, 0
    for factor in (1, 2, 10):
        started = time.monotonic()
        outcomes = await offer(server, rate * factor, seconds)
        goodput[factor] = sum(o.done for o in outcomes) / (time.monotonic() - started)
        turned_away = [o for o in outcomes if o.status in (429, 503)]
        refused += len(turned_away)
        lost = [o for o in outcomes if not o.done and o not in turned_away]
        ttfts = [o.ttft_s for o in outcomes if o.done]
        p50_ms = statistics.median(ttfts or [0]) * 1e3
        print(
            f"{factor:>3}x: {len(outcomes)} offered, {len(ttfts)} finished "
            f"({goodput[factor]:.1f}/s), {len(turned_away)} refused, TTFT p50 {p50_ms:.0f} ms "
            f"p99 {p99_ms(ttfts):.0f} ms, MiB {server.sample()}"
        )
        verdicts.judge(
            f"L1 {factor}x: each request ends in a result or a refusal",
            not lost,
            f"{len(lost)} lost {[o.error for o in lost[:2]] or ''}",
        )
        late = sum(o.status == 200 and bool(o.error) for o in outcomes)
        verdicts.judge(f"L2 {factor}x: no 200 and then busy", not late, f"{late}")
        verdicts.judge(
            f"L1 {factor}x: refusals say when to come again",
            all(o.retry_after for o in turned_away),
            f"{sum(o.retry_after for o in turned_away)} of {len(turned_away)}",
        )
        slowest = p99_ms([o.total_s for o in turned_away])
        verdicts.judge(f"L1 {factor}x: refusals p99 <= 50 ms", slowest <= 50, f"{slowest:.0f} ms")
    share = goodput[10] / goodput[1]
    verdicts.judge("L1 goodput at 10x >= 95 % of 1x", share >= 0.95, f"{share:.1%}")
    counted = (await state(server))["refused"]
    assert isinstance(counted, dict)
    verdicts.judge(
        "L1 both sides count the same refusals",
        sum(counted.values()) == refused,
        f"{refused} here, {counted} there",
    )
    verdicts.judge("nothing runs, waits or is held afterwards", await idle(server), "")
    verdicts.judge(
        "L9 files are closed again",
        server.num_files() <= files + 2,
        f"{files} before, {server.num_files()} after",
    )
    await end(server)


async def crowds(kind: str, num_streams: int, verdicts: Verdicts) -> None:
    server = await start(kind, *flags(kind, 2 * num_streams))
    outcomes = await asyncio.gather(*(ask(server) for _ in range(num_streams)))
    done = sum(o.done for o in outcomes)
    verdicts.judge(f"{num_streams} streams at once all end", done == num_streams, f"{done}")
    await asyncio.gather(*(ask(server, 1000, leave_after=1) for _ in range(num_streams // 2)))
    left = time.monotonic()
    free = await idle(server)
    seen = f"{time.monotonic() - left:.2f} s"
    verdicts.judge("F1 F2 a storm of leavers leaves nothing behind", free, seen)
    before = server.sample()["http"]
    slow = [asyncio.create_task(ask(server, 500, 0.2, 20)) for _ in range(50)]
    await asyncio.sleep(0.5)
    quick = await ask(server)
    verdicts.judge("L8 slow readers hold up nobody", quick.done, f"{quick.total_s:.2f} s")
    await asyncio.gather(*slow)
    grown = server.sample()["http"] - before
    verdicts.judge("L8 at most 1 MiB for each slow reader", grown <= 50, f"{grown} MiB for 50")
    verdicts.judge("nothing runs, waits or is held afterwards", await idle(server), "")
    await end(server)


async def faults(kind: str, verdicts: Verdicts) -> None:
    server = await start(kind, *flags(kind, 64))
    streams = [asyncio.create_task(ask(server, 1000)) for _ in range(8)]
    await until_running(server, 8)
    killed = time.monotonic()
    os.kill(server.engine_pid, signal.SIGKILL)
    outcomes = await asyncio.gather(*streams)
    told_s = time.monotonic() - killed
    errors = sum("error" in o.error for o in outcomes)
    verdicts.judge(
        "F3 kill -9: every stream ends with an error within 1 s",
        errors == 8 and told_s <= 1.0,
        f"{errors} of 8 in {told_s:.2f} s",
    )
    while (await get(server, "/ready"))[0] != 200 and time.monotonic() < killed + PATIENCE_S:
        await asyncio.sleep(0.02)
    back_s = time.monotonic() - killed
    verdicts.judge("F3 serves again", (await ask(server)).done, f"{back_s:.2f} s after the kill")
    streams = [asyncio.create_task(ask(server, 200)) for _ in range(8)]
    await until_running(server, 8)
    server.process.terminate()
    while (await get(server, "/ready"))[0] != 503:
        await asyncio.sleep(0.001)
    late = await ask(server)
    verdicts.judge("F7 SIGTERM: new ones get 503", late.status == 503 and late.retry_after, "")
    outcomes = await asyncio.gather(*streams)
    last = time.monotonic()
    code = await asyncio.wait_for(server.process.wait(), PATIENCE_S)
    exit_s, done = time.monotonic() - last, sum(o.done for o in outcomes)
    verdicts.judge("F7 running ones finish", done == 8, f"{done} of 8")
    verdicts.judge("F7 exit 0 within 1 s", code == 0 and exit_s <= 1, f"{code}, {exit_s:.2f} s")


async def until_running(server: Server, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await state(server))["running"] != count:
            await asyncio.sleep(0.01)


def flags(kind: str, queued: int) -> list[str]:
    return ["--max-queued" if kind == "fake" else "--max-num-queued-reqs", str(queued)]


async def end(server: Server) -> None:
    server.process.terminate()
    await asyncio.wait_for(server.process.wait(), PATIENCE_S)


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=("fake", "demo"), default="fake")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load at each rate")
    parser.add_argument("--streams", type=int, default=1000, help="at once")
    parser.add_argument("--quick", action="store_true", help="2 s, 100 streams")
    given = parser.parse_args()
    seconds, streams = (2.0, 100) if given.quick else (given.seconds, given.streams)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    verdicts = Verdicts()
    await overload(given.server, seconds, verdicts)
    await crowds(given.server, streams, verdicts)
    await faults(given.server, verdicts)
    return 1 if verdicts.failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
