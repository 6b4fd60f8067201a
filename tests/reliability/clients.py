"""Clients of a server under test: one request, an open loop of them, a crowd."""

import asyncio
import gc
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import uvloop
from harness import MAX_FILES, allow_files

from morphserve.morphcli.bench import http
from morphserve.morphcli.bench.http import HttpError, ServerSentEvents, host_and_port

PATIENCE_S = 120.0
MAX_REQUESTS = 120_000  # of one open loop
_LAG_S = 0.01  # between looks at the client's own delay


@dataclass(slots=True)
class Answer:
    """What one request came to."""

    status: int = 0  # 0: no answer
    first_s: float | None = None  # to the status of a refusal, or to the first token
    total_s: float = 0.0
    num_chunks: int = 0
    gaps_s: list[float] = field(default_factory=list)  # between pieces
    finished: bool = False  # to the end, or refused in full
    error: str | None = None
    retry_after: str | None = None

    @property
    def done(self) -> bool:
        """Whether it was served in full."""
        return self.finished and self.status == 200

    @property
    def refused(self) -> bool:
        return self.finished and self.status in (429, 503)


class Response(http.Answer):
    """One that keeps `Retry-After`, and knows whether its connection can be used again."""

    retry_after: str | None = None
    is_complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.retry_after = value.decode()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.is_complete = True


class Connections:
    """Kept alive and used again, like those of the clients people have."""

    def __init__(self, url: str) -> None:
        self._address = host_and_port(url)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[Response]:
        """Whoever does not read the answer to its end spoils the connection, which is closed."""
        reader, writer = await self._take()
        answer = Response(reader)
        try:
            host, port = self._address
            head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}"
            writer.write(head.encode() + b"\r\n\r\n" + body)
            await answer.read_head()
            yield answer
        finally:
            if answer.is_complete and not writer.is_closing():
                self._idle.append((reader, writer))
            else:
                writer.close()

    async def _take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
        return await asyncio.open_connection(*self._address, limit=4096)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def complete(
    where: str | Connections, *, pause_s: float = 0.0, leave_after: int = 0, **fields: Any
) -> Answer:
    """One streamed completion.

    `pause_s`: between its events; `leave_after`: so many of them (0: never).
    """
    connections = Connections(where) if isinstance(where, str) else where
    body = json.dumps({"prompt": "def ", "stream": True, "temperature": 0} | fields).encode()
    started, answer = time.monotonic(), Answer()
    try:
        async with (
            asyncio.timeout(PATIENCE_S),
            connections.post("/v1/completions", body) as response,
        ):
            answer.status, answer.retry_after = response.status, response.retry_after
            if answer.status != 200:
                answer.error = (await response.read()).decode(errors="replace")
                answer.first_s, answer.finished = time.monotonic() - started, True
            else:
                events = ServerSentEvents(response)
                await _read_stream(events, answer, started, pause_s, leave_after)
    except (OSError, HttpError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.total_s = time.monotonic() - started
    if connections is not where:
        connections.close()
    return answer


async def _read_stream(
    events: ServerSentEvents, answer: Answer, started: float, pause_s: float, leave_after: int
) -> None:
    before = started
    async for data in events:
        now = time.monotonic()
        if data == b"[DONE]":
            answer.finished = True
            continue  # to the end of the response, after which its connection serves again
        if b'"error"' in data[:10]:
            answer.error = data.decode()
            return
        if answer.first_s is None:
            answer.first_s = now - started
        else:
            answer.gaps_s.append(now - before)
        before = now
        answer.num_chunks += 1
        if answer.num_chunks == leave_after:
            return
        if pause_s:
            await asyncio.sleep(pause_s)


@dataclass(frozen=True, slots=True)
class Load:
    """An open loop: requests come when they come, whatever becomes of those before."""

    times_s: Sequence[float]
    fields: Sequence[dict[str, Any]]  # of each request


@dataclass(slots=True)
class Seen:
    """By the clients of an open loop."""

    answers: list[Answer]
    seconds: float
    lag_s: list[float]  # by which the client itself was late, every 10 ms


def poisson(rate: float, seconds: float, **fields: Any) -> Load:
    """Arrivals at `rate` per second."""
    random_, times = random.Random(0), [0.0]
    while times[-1] < seconds and len(times) < MAX_REQUESTS:
        times.append(times[-1] + random_.expovariate(rate))
    return Load(times, [fields] * len(times))


def offer(url: str, load: Load) -> Seen:
    """Runs the load in a process of its own, so that measuring does not hold it up."""
    with ProcessPoolExecutor(1) as pool:
        return pool.submit(_offer, url, load).result()


def _offer(url: str, load: Load) -> Seen:
    allow_files(MAX_FILES)
    gc.freeze()  # the client's own pauses are not the server's
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_open_loop(url, load))


async def _open_loop(url: str, load: Load) -> Seen:
    connections, lag_s, tasks = Connections(url), [], []
    watching = asyncio.create_task(_watch_lag(lag_s))
    started = time.monotonic()
    for due, fields in zip(load.times_s, load.fields, strict=True):
        await asyncio.sleep(max(0.0, started + due - time.monotonic()))
        tasks.append(asyncio.create_task(complete(connections, **fields)))
    answers = await gather(*tasks)
    watching.cancel()
    connections.close()
    return Seen(answers, time.monotonic() - started, lag_s)


async def _watch_lag(lag_s: list[float]) -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(_LAG_S)
        lag_s.append(time.monotonic() - before - _LAG_S)


def closed_loop(url: str, clients: int, seconds: float, **fields: Any) -> Seen:
    """Clients that ask again as soon as they have their answer, in a process of their own."""
    with ProcessPoolExecutor(1) as pool:
        return pool.submit(_closed_loop, url, clients, seconds, fields).result()


def _closed_loop(url: str, clients: int, seconds: float, fields: dict[str, Any]) -> Seen:
    async def client(connections: Connections, end: float) -> list[Answer]:
        answers = []
        while time.monotonic() < end:
            answers.append(await complete(connections, **fields))
        return answers

    async def all_clients() -> Seen:
        started, connections = time.monotonic(), Connections(url)
        work = partial(client, connections, started + seconds)
        answers = sum(await gather(*(work() for _ in range(clients))), [])
        connections.close()
        return Seen(answers, time.monotonic() - started, [])

    return asyncio.run(all_clients())


async def gather(*works: Any) -> list[Any]:
    return list(await asyncio.gather(*works))
