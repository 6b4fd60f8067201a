"""Processes that are killed, told to stop, or stand still: F3, F7, F14."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from clients import Answer, complete, gather
from harness import FAKE, START_S, Given, Rules, Server, get, launch, make_bundle, serving, tight

STAND_STILL_S = 7.0  # the watchdog of the event loop takes 5.5 s


def killed_engine(rules: Rules, given: Given) -> None:
    """F3: kill -9 of the engine with 8 streams."""
    with serving(["--policy", "off"], log=given.folder / "killed.log") as server:
        with _streams(server, 8, max_tokens=1000) as ended:
            killed = time.monotonic()
            os.kill(server.pids()[1], signal.SIGKILL)
            answers = ended()
        told_s = time.monotonic() - killed
        errors = sum(answer.error is not None for answer in answers)
        rules.check(
            "F3",
            "kill -9 of the engine: 8 streams end with an error within 1 s",
            f"{errors} in {told_s:.2f} s",
            errors == 8 and told_s <= 1.0,
        )
        server.await_health("/ready")
        back_s = time.monotonic() - killed
        answer = asyncio.run(complete(server.url, max_tokens=4))
        startup = sum(_startup_s(server))
        rules.check(
            "F3",
            "serves again within 3 s + the time of a start",
            f"{back_s:.2f} s after the kill (start {startup:.1f} s)",
            answer.done and back_s <= 3 + startup,
        )


def _startup_s(server: Server) -> list[float]:
    """Phases of the latest start, as its log line tells the sum."""
    line = next(line for line in server.log.read_text().splitlines() if "started in" in line)
    return [float(line.split("started in ")[1].split()[0])]


def stopped(rules: Rules, given: Given) -> None:
    """F7: SIGTERM idle, with streams, twice, while it starts, and while layers swap."""
    with serving(["--policy", "off"], log=given.folder / "idle.log") as server:
        server.process.terminate()
        _judge_exit(rules, server, "idle", time.monotonic())
    with serving(["--policy", "off"], log=given.folder / "streams.log") as server:
        _with_streams(rules, server)
    with serving(["--policy", "off"], log=given.folder / "twice.log") as server:
        _twice(rules, server)
    _while_starting(rules, given)
    with serving(tight(make_bundle(given.folder)), log=given.folder / "swaps.log") as server:
        _while_swapping(rules, server)


def _with_streams(rules: Rules, server: Server) -> None:
    with _streams(server, 8, max_tokens=300) as ended:
        server.process.terminate()
        while get(server.url, "/ready")[0] != 503:
            time.sleep(0.001)
        late = asyncio.run(complete(server.url, max_tokens=4))
        answers = ended()
    last = time.monotonic()
    seen = f"{late.status}, Retry-After {late.retry_after}"
    rules.check(
        "F7", "new ones get 503 and Retry-After", seen, late.refused and bool(late.retry_after)
    )
    done = sum(answer.done for answer in answers)
    rules.check("F7", "8 running ones finish", f"{done}", done == 8)
    _judge_exit(rules, server, "after the last stream", last)


def _twice(rules: Rules, server: Server) -> None:
    with _streams(server, 8, max_tokens=1000) as ended:
        server.process.terminate()
        time.sleep(0.2)
        server.process.terminate()
        second = time.monotonic()
        answers = ended()
    told = sum(answer.error is not None for answer in answers)
    rules.check("F7", "a second SIGTERM: 8 streams end with an error event", f"{told}", told == 8)
    _judge_exit(rules, server, "after the second signal", second)


def _while_starting(rules: Rules, given: Given) -> None:
    """A signal after 0, 0.2, 0.4, ... s of a start."""
    codes, hung, left = [], 0.0, 0
    for i in range(12):
        server = launch(["--policy", "off"], log=given.folder / f"starting-{i}.log")
        time.sleep(0.2 + 0.2 * i)
        pids = server.pids()
        server.process.terminate()
        told = time.monotonic()
        codes.append(server.process.wait(START_S))
        hung = max(hung, time.monotonic() - told)
        left += sum(os.path.exists(f"/proc/{pid}") for pid in pids)
    allowed = {0, 128 + signal.SIGTERM, -signal.SIGTERM}  # served; loads; before Python is ours
    rules.check(
        "F7",
        "SIGTERM at 12 moments of a start: exit 0 or by the signal within 2 s, nothing left",
        f"codes {codes}, at most {hung:.2f} s, {left} processes left",
        set(codes) <= allowed and hung <= 2.0 and not left,
    )


def _while_swapping(rules: Rules, server: Server) -> None:
    with _streams(server, 24, prompt=[7] * 200, max_tokens=60) as ended:
        deadline = time.monotonic() + START_S
        while not server.state()["swapping"] and time.monotonic() < deadline:
            time.sleep(0.001)
        server.process.terminate()
        answers = ended()
    last = time.monotonic()
    done = sum(answer.done for answer in answers)
    rules.check("F7", "SIGTERM while a layer swaps: 24 running ones finish", f"{done}", done == 24)
    _judge_exit(rules, server, "after the last stream", last)


def _judge_exit(rules: Rules, server: Server, when: str, since: float) -> None:
    code = server.process.wait(START_S)
    took = time.monotonic() - since
    rules.check(
        "F7", f"exit 0 within 1 s, {when}", f"{code}, {took:.2f} s", code == 0 and took <= 1
    )


@contextmanager
def _streams(server: Server, count: int, **fields: object) -> Iterator[Callable[[], list[Answer]]]:
    """So many streams, each begun; what is yielded waits for their ends."""

    def run() -> list[Answer]:
        return asyncio.run(_together(server, count, fields))

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(run)
        _await_taken(server, count)
        yield answers.result


async def _together(server: Server, count: int, fields: dict[str, object]) -> list[Answer]:
    return await gather(*(complete(server.url, ignore_eos=True, **fields) for _ in range(count)))


def _await_taken(server: Server, count: int) -> None:
    deadline = time.monotonic() + START_S
    while (state := server.state())["running"] + state["waiting"] < count:
        assert time.monotonic() < deadline, state
        time.sleep(0.005)


def blocked_loop(rules: Rules, given: Given) -> None:
    """F14: the HTTP process stands still, with code that holds Python's lock too."""
    log = given.folder / "blocked.log"
    with serving(["--block-on-usr1", f"{STAND_STILL_S}"], command=FAKE, log=log) as server:
        server.process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        server.await_health()
        told = log.read_text()
        answer = asyncio.run(complete(server.url, max_tokens=4))
    stacks = told.count("most recent call first") and told.count("stand_still")
    rules.check(
        "F14",
        f"an event loop blocked for {STAND_STILL_S:g} s: its stack in the log, then serves again",
        f"{stacks} stack, {'served' if answer.done else answer.error}",
        stacks == 1 and "stood still" in told and answer.done,
    )
