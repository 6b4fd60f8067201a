"""Many clients at once, patient, impatient and slow: L3, L6, L7, L8, F1, F2."""

import asyncio
import time

from clients import Answer, closed_loop, complete, gather
from harness import Given, Rules, Server, allow_files, connect, percentile, serving

LONG = {"max_tokens": 1000, "ignore_eos": True}


def crowds(rules: Rules, given: Given) -> None:
    """L3, L8, F1, F2: as many streams as asked for, leavers, slow readers, idle connections."""
    count = given.streams
    allow_files(8 * count)
    arguments = ["--policy", "off", "--max-num-queued-reqs", str(2 * count)]
    with serving(arguments, log=given.folder / "crowds.log") as server:
        seen = asyncio.run(_at_once(server, count, max_tokens=32))
        done = sum(answer.done for answer in seen)
        rules.check("L1", f"{count} streams at once all end", f"{done} done", done == count)
        server.await_idle()
        asyncio.run(_at_once(server, min(count, 100), leave_after=1, **LONG))
        _judge_idle(rules, server, "F1", f"{min(count, 100)} leave after the first token")
        asyncio.run(_leave_the_queue(server, count))
        _judge_idle(rules, server, "F2", f"{count} leave while running or queued")
        _slow_readers(rules, server)
        _idle_connections(rules, server, count)


async def _at_once(server: Server, count: int, **fields: object) -> list[Answer]:
    return await gather(*(complete(server.url, **fields) for _ in range(count)))


async def _leave_the_queue(server: Server, count: int) -> None:
    tasks = [asyncio.create_task(complete(server.url, **LONG)) for _ in range(count)]
    await asyncio.sleep(1.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _judge_idle(rules: Rules, server: Server, name: str, what: str) -> None:
    left = time.monotonic()
    server.await_idle()
    took = time.monotonic() - left
    rules.check(name, f"{what}: nothing is held after 1 s", f"{took:.2f} s", took <= 1.0)


def _slow_readers(rules: Rules, server: Server) -> None:
    before = server.rss_mib()
    quick_s, grown = asyncio.run(_beside_slow_readers(server, before))
    rules.check("L8", "50 slow readers hold up nobody for 5 s", f"{quick_s:.2f} s", quick_s <= 5)
    seen = f"{grown:.1f} MiB for 50"
    rules.check("L8", "at most 1 MiB for each slow reader", seen, grown <= 50)
    server.await_idle()


async def _beside_slow_readers(server: Server, before: float) -> tuple[float, float]:
    """Seconds of a quick request, and most MiB that the server grew by."""
    works = [complete(server.url, pause_s=0.5, leave_after=10, **LONG) for _ in range(50)]
    tasks = [asyncio.create_task(work) for work in works]
    await asyncio.sleep(0.5)
    quick, grown = await complete(server.url, max_tokens=16), 0.0
    while not all(task.done() for task in tasks):
        grown = max(grown, server.rss_mib() - before)
        await asyncio.sleep(0.1)
    return quick.total_s if quick.done else float("inf"), grown


def _idle_connections(rules: Rules, server: Server, count: int) -> None:
    connections = [connect(server) for _ in range(count)]
    p99 = percentile([server.probe() for _ in range(50)], 0.99) * 1000
    rules.check(
        "L3", f"{count} idle connections: a probe takes <= 100 ms", f"{p99:.0f} ms", p99 <= 100
    )
    for connection in connections:
        connection.close()


def fairness(rules: Rules, given: Given) -> None:
    """L6, L7: small requests beside a flood, and beside long prompts."""
    with serving(["--policy", "off"], log=given.folder / "fairness.log") as server:
        alone = closed_loop(server.url, 1, 2.0, max_tokens=4).answers
        gaps = asyncio.run(_beside_long_prompts(server))
    alone_ms = percentile([answer.first_s or 60.0 for answer in alone], 0.99) * 1000
    p50, p99 = percentile(gaps, 0.5) * 1000, percentile(gaps, 0.99) * 1000
    rules.check(
        "L7",
        "beside 8 prompts of 900 tokens: gaps between tokens of a short answer, p99",
        f"{p99:.0f} ms (p50 {p50:.0f} ms; alone the first token takes {alone_ms:.0f} ms)",
        p99 <= max(3 * p50, 150),
    )


async def _beside_long_prompts(server: Server) -> list[float]:
    short = asyncio.create_task(complete(server.url, max_tokens=200, ignore_eos=True))
    await asyncio.sleep(0.3)
    await gather(*(complete(server.url, prompt=[7 + i] * 900, max_tokens=2) for i in range(8)))
    return (await short).gaps_s
