"""More requests than can be served: L1, L2, L9, L10."""

import json
import statistics
import threading
import time
from importlib import resources
from pathlib import Path
from typing import Any

from clients import Answer, Load, Seen, closed_loop, offer, poisson
from harness import Given, Rules, Server, get, make_bundle, percentile, serving, tight

from morphserve.morphcli.traces.readers import read_trace
from morphserve.morphcli.traces.schedule import Shape, shape_trace

QUEUED = 64
W = {"prompt": "def main():\n    return ", "max_tokens": 32, "ignore_eos": True}
_LONG = 4  # times as long lasts the heaviest load, in which memory must stay flat
TURN_S = 2.0  # between two changes of direction of swaps
RESTORE_S = 30.0  # for layers to come back after the last request


def overload(rules: Rules, given: Given) -> None:
    """L1, L2, L9: Poisson arrivals at 1, 2, 5 and 10 times what can be served."""
    arguments = ["--policy", "off", "--max-num-queued-reqs", str(QUEUED)]
    with serving(arguments, log=given.folder / "overload.log") as server:
        seen = closed_loop(server.url, QUEUED, given.seconds, **W)
        rate = sum(answer.done for answer in seen.answers) / seen.seconds
        print(f"  capacity {rate:.1f} requests/s")
        files, threads = server.num_fds(), server.num_threads()
        goodput, refused = {}, 0
        for factor in (1, 2, 5, 10):
            memory = Memory(server)
            with memory:
                seconds = given.seconds * (_LONG if factor == 10 else 1)
                seen = offer(server.url, poisson(rate * factor, seconds, **W))
            goodput[factor] = sum(answer.done for answer in seen.answers) / seen.seconds
            refused += _judge(rules, f"{factor}x", seen, goodput[factor])
            if factor == 10:
                memory.judge(rules)
        share = goodput[10] / goodput[1]
        rules.check("L1", "goodput at 10x >= 95 % of 1x", f"{share:.1%}", share >= 0.95)
        told = server.state()["refused"]
        rules.check(
            "L1",
            "both sides count the same refusals",
            f"{refused} here, {told} there",
            sum(told.values()) == refused,
        )
        server.await_idle()
        after = server.num_fds(), server.num_threads()
        rules.check(
            "L9",
            "files and threads of all processes as before",
            f"{(files, threads)} before, {after} after",
            after[0] <= files + 4 and after[1] <= threads + 2,
        )


def _judge(rules: Rules, load: str, seen: Seen, goodput: float) -> int:
    """Rules of one open loop; how many were refused."""
    refused = [answer for answer in seen.answers if answer.refused]
    lost = [answer for answer in seen.answers if not answer.finished]
    first = [answer.first_s or 0.0 for answer in seen.answers if answer.done]
    median, p99 = statistics.median(first or [0]) * 1e3, percentile(first, 0.99) * 1e3
    print(
        f"  {load}: {len(seen.answers)} offered, {len(first)} finished ({goodput:.1f}/s), "
        f"{len(refused)} refused, first token p50 {median:.0f} ms p99 {p99:.0f} ms"
    )
    rules.check(
        f"L1 {load}",
        "each request ends in a result or a refusal",
        f"{len(lost)} lost {sorted({str(answer.error) for answer in lost})[:2] or ''}",
        not lost,
    )
    late = sum(answer.status == 200 and answer.error is not None for answer in seen.answers)
    rules.check(f"L2 {load}", "no 200 and then busy", f"{late}", not late)
    if refused:
        bound = 1.2e3 * QUEUED / goodput
        rules.check(
            f"L1 {load}",
            f"first token p99 <= {QUEUED} queued at the goodput, and a fifth",
            f"{p99:.0f} of {bound:.0f} ms",
            p99 <= bound,
        )
        _judge_refusals(rules, load, refused, seen.lag_s)
    return len(refused)


def _judge_refusals(rules: Rules, load: str, refused: list[Answer], lag_s: list[float]) -> None:
    honest = sum((answer.retry_after or "").isdigit() for answer in refused)
    rules.check(
        f"L1 {load}",
        "refusals say when to come again",
        f"{honest} of {len(refused)}",
        honest == len(refused),
    )
    p50, p99 = (percentile([a.total_s for a in refused], share) * 1e3 for share in (0.5, 0.99))
    late_ms = max(lag_s) * 1e3  # what the machine held up, it held up for both sides
    rules.check(
        f"L1 {load}",
        "refusals p99 <= 50 ms",
        f"{p99:.0f} ms (p50 {p50:.0f} ms; the client itself was late by {late_ms:.0f} ms once)",
        p99 <= 50,
    )


class Memory:
    """Resident memory of a server, twice a second."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._mib: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.5):
            self._mib.append(self._server.rss_mib())

    def judge(self, rules: Rules) -> None:
        """The first third is warming up."""
        third = max(1, len(self._mib) // 3)
        begin, end = (
            statistics.median(part) for part in (self._mib[third : 2 * third], self._mib[-third:])
        )
        minutes = third / 120
        rules.check(
            "L9",
            "memory at 10x grows by less than 1 MiB/min, or by 2 MiB in all",
            f"{begin:.0f} to {end:.0f} MiB in {minutes * 60:.0f} s",
            end - begin <= max(2.0, minutes),
        )


def bursts(rules: Rules, given: Given) -> None:
    """L10: a burst at 20 times its speed; swaps do not flap."""
    bundle = make_bundle(given.folder)
    with serving(tight(bundle), log=given.folder / "bursts.log") as server:
        events = Events(server)
        with events:
            seen = offer(server.url, _burst(given.seconds))
            server.await_idle()
            _await_restored(server)
    lost = sum(not answer.finished for answer in seen.answers)
    finished, refused = (
        sum(getattr(answer, name) for answer in seen.answers) for name in ("done", "refused")
    )
    rules.check(
        "L10",
        "a burst at 20x speed: each request ends in a result or a refusal",
        f"{finished} finished, {refused} refused, {lost} lost",
        not lost,
    )
    swaps, turns = events.swaps(), events.turns()
    shortest = min(
        (later - before for before, later in zip(turns, turns[1:], strict=False)), default=None
    )
    rules.check(
        "L10",
        f"swaps change direction at most once in {TURN_S:g} s",
        f"{len(swaps)} swaps, {len(turns)} turns, {shortest and round(shortest, 2)} s apart",
        bool(swaps) and (shortest is None or shortest >= TURN_S),
    )


def _await_restored(server: Server) -> None:
    deadline = time.monotonic() + RESTORE_S
    while server.state()["rung"] and time.monotonic() < deadline:
        time.sleep(0.1)


def _burst(seconds: float) -> Load:
    """The shipped burst, again and again, with lengths and a rate that the demo model takes."""
    trace = Path(str(resources.files("morphserve.morphcli.bench").joinpath("azure2023_burst.csv")))
    shape = Shape(
        rate_scale=0.15, time_scale=1 / 20, length_scale=0.1, max_prompt=384, max_output=64
    )
    schedule = shape_trace(read_trace(trace), shape)
    # 20 times its speed lasts 3 s; then as long a pause, in which layers come back.
    starts = range(0, max(1, int(seconds)), 2 * int(schedule.duration_s + 1))
    arrivals = [(start + a.time_s, a) for start in starts for a in schedule.arrivals]
    fields: list[dict[str, Any]] = [
        {"prompt": [9] * a.prompt_tokens, "max_tokens": a.output_tokens, "ignore_eos": True}
        for _, a in arrivals
    ]
    return Load([time for time, _ in arrivals], fields)


class Events:
    """All events of a server, collected while it runs."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._events: dict[int, dict[str, Any]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._collect)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _collect(self) -> None:
        while not self._stop.wait(0.2):
            state = json.loads(get(self._server.url, "/morph/v1/state", timeout_s=30.0)[1])
            self._events |= {event["id"]: event for event in state["events"]}

    def swaps(self) -> list[dict[str, Any]]:
        events = (self._events[number] for number in sorted(self._events))
        return [event for event in events if event["kind"] in ("demote", "promote")]

    def turns(self) -> list[float]:
        """Times at which swaps began to go the other way."""
        swaps = self.swaps()
        pairs = zip(swaps, swaps[1:], strict=False)
        return [b["time"] for a, b in pairs if a["kind"] != b["kind"]]
