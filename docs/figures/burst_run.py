"""What docs/figures/burst.py sends to a server, and what it reads from it meanwhile."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from morphserve.morphcli.bench import client, server
from morphserve.morphcli.bench.client import Outcome, Plan, PlannedRequest

PROMPT_TOKENS, OUTPUT_TOKENS = 200, 120
CALM_SHARE = 1 / 8  # of the peak
BURST_S = (8.0, 20.0)
SENT_S = 44.0  # after which no request is sent
WATCHED_S = 52.0
SAMPLES_S = 0.1


class Decided(msgspec.Struct):
    """An event of the server."""

    id: int
    time: float  # seconds since the epoch
    kind: str
    text: str


class State(server.State, kw_only=True):
    """The part of a server's state that is drawn."""

    demand: int  # blocks
    events: list[Decided]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was sent to one server and how it went."""

    title: str
    started: float  # seconds since the epoch
    states: Sequence[State]
    outcomes: Sequence[Outcome]

    @property
    def times_s(self) -> list[float]:
        """Of the states, since the start."""
        return [state.time - self.started for state in self.states]

    @property
    def decisions(self) -> list[tuple[float, str]]:
        """When since the start, and why."""
        events = {event.id: event for state in self.states for event in state.events}
        told = (events[number] for number in sorted(events))
        return [(e.time - self.started, e.text) for e in told if e.kind == "decision"]


def plan(url: str, peak: float) -> Plan:
    """Requests at even distances, no two with the same beginning."""
    calm = CALM_SHARE * peak
    phases = ((0.5, BURST_S[0], calm), (*BURST_S, peak), (BURST_S[1], SENT_S, calm))
    times = np.concatenate([np.arange(start, end, 1 / rate) for start, end, rate in phases])
    requests = [
        PlannedRequest(i, at, _prompt(i), PROMPT_TOKENS, OUTPUT_TOKENS)
        for i, at in enumerate(times.tolist())
    ]
    return Plan(url, server.served_model(url), 60.0, requests)


def _prompt(index: int) -> list[int]:
    return [5 + (7919 * (index + 1) + 31 * i) % 4000 for i in range(PROMPT_TOKENS)]


async def record(url: str, peak: float, title: str) -> Recorded:
    """Sends the plan and reads the server's state until WATCHED_S, and to the last answer."""
    planned = plan(url, peak)
    started, started_s = time.time(), time.monotonic()
    states: list[State] = []
    watching = asyncio.create_task(_watch(url, started_s, states))
    outcomes = [outcome async for outcome in client.replay(planned, started_s)]
    await watching
    return Recorded(title, started, states, outcomes)


async def _watch(url: str, started_s: float, states: list[State]) -> None:
    due = started_s
    while due < started_s + WATCHED_S:
        with contextlib.suppress(OSError):  # a sample that is missing leaves a gap of 0.1 s
            _, body = await asyncio.to_thread(server.get, url, "/morph/v1/state")
            states.append(msgspec.json.decode(body, type=State))
        due = max(due + SAMPLES_S, time.monotonic())
        await asyncio.sleep(due - time.monotonic())
