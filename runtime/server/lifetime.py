"""A server's life beside its engine: loading, HTTP, signals, draining."""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from morphserve.configs.schema import EngineConfig, ServerConfig
from morphserve.runtime.engine_client import EngineClient
from morphserve.runtime.messages import Hello, Snapshot
from morphserve.runtime.metrics import Metrics
from morphserve.runtime.server.admission import QUEUED_CACHES, Admission
from morphserve.runtime.server.app import make_app
from morphserve.runtime.server.connections import http_config, limits_here
from morphserve.runtime.server.files import listen
from morphserve.runtime.server.logs import say
from morphserve.runtime.server.run import Watch
from morphserve.runtime.server.serving import Serving
from morphserve.runtime.supervisor import Supervisor
from morphserve.runtime.tokenizer import Tokenizer

_ABORT_GRACE_S = 0.5  # for sending the last words of requests that were ended

T = TypeVar("T")

logger = logging.getLogger(__name__)


class _Http(uvicorn.Server):
    """uvicorn without its signal handling, which cannot answer 503 while draining."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Interrupts:
    """SIGINT, SIGTERM, SIGHUP: the first asks for an end, the second for an end at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.signal_number = 0
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        self.signal_number = self.signal_number or number
        (self.second if self.first.is_set() else self.first).set()


async def live(
    supervisor: Supervisor,
    config: EngineConfig,
    server: ServerConfig,
    watch: Watch,
    listener: socket.socket,
) -> int:
    """The server, from when its engine process runs to the exit code, as `run_server` says."""
    interrupts = Interrupts()
    _say(f"loading {server.served_model_name} ...")
    try:
        tokenizer = await _unless(interrupts.first, _start(supervisor, config))
        if tokenizer is None:
            return 128 + interrupts.signal_number
        engine = supervisor.client
        _say(start_line(engine.hello, engine.snapshot, config.cache.memory_budget))
        serving = _serving(engine, tokenizer, config, server)
        gc.collect()
        gc.freeze()  # searching what was loaded for garbage would hold up every stream
        async with serving.watchdog.watching():
            return await _serve(serving, supervisor, server, watch, listener, interrupts)
    finally:
        await supervisor.close()


def _serving(
    engine: EngineClient, tokenizer: Tokenizer, config: EngineConfig, server: ServerConfig
) -> Serving:
    max_requests = engine.hello.max_num_seqs + server.max_queued
    # Morph first, refuse last: what may wait is measured by the cache of the deepest rung.
    cache_tokens = engine.hello.capacities[-1] * engine.hello.block_tokens
    admission = Admission(
        max_requests,
        server.max_queued_tokens or QUEUED_CACHES * cache_tokens,
        server.overload_status,
    )
    metrics = Metrics(lambda: engine.snapshot)
    name = server.served_model_name
    return Serving(engine, tokenizer, metrics, name, admission, slo=config.slo)


def start_line(hello: Hello, snapshot: Snapshot, memory_budget: int | None) -> str:
    """What the engine has come to: device, policy, memory, room for tokens; the time it took."""
    budget = "automatic" if memory_budget is None else f"{memory_budget / 2**20:.0f} MiB"
    if hello.memory.activations is not None:
        beside = hello.memory.activations / 2**20
        budget = f"{hello.memory.budget / 2**20:.0f} MiB beside {beside:.0f} MiB for activations"
    threads = f"{hello.threads} thread{'' if hello.threads == 1 else 's'}, "
    full, most = (n * snapshot.block_tokens for n in (snapshot.blocks_full, snapshot.blocks_max))
    room = (
        f"{full} tokens at full precision and {most} at most" if most > full else f"{full} tokens"
    )
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in hello.startup_s.items())
    return (
        f"{hello.kernels} kernels on {hello.device}, policy {snapshot.policy}, "
        f"{threads if hello.threads else ''}"
        f"memory budget {budget}, KV cache of {room}, "
        f"started in {sum(hello.startup_s.values()):.1f} s ({phases})"
    )


def _say(line: str) -> None:
    """Tells the terminal or the log; without either, serving goes on."""
    with contextlib.suppress(OSError):
        say("start", line)


async def _start(supervisor: Supervisor, config: EngineConfig) -> Tokenizer:
    """The tokenizer, once the engine serves; the two load at the same time."""
    tokenizer, _ = await asyncio.gather(
        asyncio.to_thread(Tokenizer, Path(config.model)), supervisor.start()
    )
    return tokenizer


async def _serve(
    serving: Serving,
    supervisor: Supervisor,
    server: ServerConfig,
    watch: Watch,
    listener: socket.socket,
    interrupts: Interrupts,
) -> int:
    serving.url = listen(listener)
    on_loopback = _is_loopback(listener)
    app = make_app(serving, server, on_loopback=on_loopback)
    http = _Http(http_config(app, limits_here(), serving.admission))
    listening = asyncio.create_task(http.serve(sockets=[listener]))
    _say(f"serving {serving.model_name} on {serving.url}")
    key = "-H 'Authorization: Bearer KEY' " if server.api_keys else ""
    body = """'{"prompt": "import ", "max_tokens": 16}'"""
    _say(f"try: curl {serving.url}/v1/completions {key}-d {body}")
    if not on_loopback and not server.api_keys:
        _say("warning: other machines can reach this server, and it checks no key")
    watching = asyncio.create_task(_watch(watch, serving))
    try:
        await _first_of(interrupts.first.wait(), supervisor.run())
        serving.stopping.set()
        if interrupts.first.is_set():
            was_dead = serving.engine.died.is_set()
            await _drain(serving, server.shutdown_timeout_s, interrupts.second)
            if was_dead or not serving.engine.died.is_set():
                return 0
        logger.error("stopping: %s", serving.engine.failure)
        return 1
    finally:
        await _first_of(serving.idle(), asyncio.sleep(_ABORT_GRACE_S))
        http.should_exit = True
        await _end(watching)
        await asyncio.gather(listening, return_exceptions=True)


async def _watch(watch: Watch, serving: Serving) -> None:
    try:
        await watch(serving)
    except Exception:
        logger.exception("the view of the running server failed; serving goes on")


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _drain(serving: Serving, timeout_s: float, hurry: asyncio.Event) -> None:
    """Lets running requests finish; what is left after the timeout, or a hurry, is aborted."""
    count = serving.admission.num_calls
    _say(f"stopping: {count} request{'' if count == 1 else 's'} to finish")
    await _first_of(
        serving.idle(), hurry.wait(), serving.engine.died.wait(), asyncio.sleep(timeout_s)
    )
    serving.engine.abort_all()


def _is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None, with the work cancelled, if the event comes first."""
    working = asyncio.create_task(work)
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if working.done():
        return working.result()
    working.cancel()
    return None


async def _first_of(*works: Coroutine[Any, Any, object]) -> None:
    """Returns when one of them is done; the others are cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
