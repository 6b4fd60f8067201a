"""A server under test: started fresh for one policy, or already running at a URL."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from morphserve.configs.errors import MorphError
from morphserve.morphcli.bench.http import address, bearer, tls_context
from morphserve.quantize.manifest import Rung, Variant
from morphserve.runtime.ladder import Ladder

Mix = tuple[Variant, ...]  # the variant of each layer

_START_TIMEOUT_S = 300.0  # the first start compiles kernels
_STOP_TIMEOUT_S = 15.0
_SAMPLE_INTERVAL_S = 0.1
_LOG_LINES = 8


class ServerFailed(MorphError):
    """A server under test did not start or died; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What every server of one comparison is started with."""

    model: Path
    bundle: Path | None
    memory_budget: str | None  # as given to `morph serve`
    max_model_len: int | None
    device: str = "auto"

    def arguments(self, policy: str, port: int) -> list[str]:
        """Command line of `morph serve`."""
        options = {
            "--bundle": None if policy == "off" else self.bundle,
            "--policy": policy,
            "--memory-budget": self.memory_budget,
            "--max-model-len": self.max_model_len,
            "--device": None if self.device == "auto" else self.device,
            "--port": port,
        }
        given = [[name, str(value)] for name, value in options.items() if value is not None]
        start = [sys.executable, "-m", "morphserve.morphcli", "serve", str(self.model)]
        return [*start, *(word for pair in given for word in pair), "--no-monitor"]


class State(msgspec.Struct):
    """The part of a server's state that a run is judged by."""

    time: float  # seconds since the epoch
    layers: list[Variant]  # that each computes in
    blocks_used: int
    blocks_capacity: int
    blocks_full: int  # capacity with every layer at full precision
    block_tokens: int
    running: int
    waiting: int
    preemptions: int
    generated_tokens: dict[Variant, int]  # by the lowest precision of the steps that made them
    swaps: int
    swapping: dict[int, Variant] = {}  # layer -> the variant it is on its way to
    ladder: list[Rung] = []  # steps of demotion, the first taken first
    device: str = ""  # that computes, as its maker calls it; empty: not told
    kernels: str = ""  # that it computes with

    @property
    def num_generated(self) -> int:
        """Tokens generated since the server's start."""
        return sum(self.generated_tokens.values())

    @property
    def num_generated_below_full(self) -> int:
        """Of these, in steps in which a layer was not at full precision."""
        return self.num_generated - self.generated_tokens.get(Variant.FULL, 0)

    @property
    def num_int4(self) -> int:
        """Layers that compute in INT4 now: one on its way there still runs at what it was."""
        return self.layers.count(Variant.INT4)

    @property
    def num_quantized(self) -> int:
        """Layers that compute in INT8 or INT4 now."""
        return len(self.layers) - self.layers.count(Variant.FULL)

    @property
    def mix(self) -> Mix:
        """The variants of all layers at the rung that the server is at."""
        ladder = Ladder(tuple(self.ladder), len(self.layers))
        return tuple(ladder.variants_at(ladder.rung_of(self.layers)))


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit inside, so that what was started is stopped too."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    # One that is ignored, as SIGHUP under nohup, stays so.
    watched = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def running_server(arguments: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """The URL of a server started by `arguments`; SIGTERM at the end.

    Raises ServerFailed with the end of its log if it does not become healthy, or has ended by
    itself when the block ends.
    """
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_without_settings(os.environ),
        )
        try:
            _await_health(process, url, log)
            yield url
            _check_alive(process, log)
        finally:
            _stop(process)


def _without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The servers of a comparison differ by their command lines alone."""
    return {name: value for name, value in environment.items() if not name.startswith("MORPH_")}


def free_port() -> int:
    """A TCP port that nothing on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_health(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        _check_alive(process, log)
        with contextlib.suppress(OSError, http.client.HTTPException):
            if get(url, "/health")[0] == 200:
                return
        time.sleep(0.05)
    raise ServerFailed(f"the server was not healthy after {_START_TIMEOUT_S:g} s: {_tail(log)}")


def _check_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        raise ServerFailed(f"the server ended with exit code {process.returncode}: {_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").splitlines()
    return "\n" + "\n".join(lines[-_LOG_LINES:]) if lines else "it wrote nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
    finally:  # also when a signal ends the wait
        process.kill()
        process.wait()


def get(
    url: str, path: str, timeout_s: float = 5.0, *, api_key: str | None = None
) -> tuple[int, bytes]:
    """Status and body of one GET."""
    at = address(url)
    connection = (
        http.client.HTTPSConnection(at.host, at.port, timeout=timeout_s, context=tls_context())
        if at.is_tls
        else http.client.HTTPConnection(at.host, at.port, timeout=timeout_s)
    )
    try:
        connection.request("GET", at.prefix + path, headers=bearer(api_key))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def served_model(url: str, api_key: str | None = None) -> str:
    """The id of the first model that the server at `url` offers."""
    try:
        status, body = get(url, "/v1/models", api_key=api_key)
        if status == 401:
            raise ServerFailed(f"{url} wants an API key: set MORPH_API_KEY, or give --api-key")
        if status != 200:
            raise ServerFailed(f"{url}/v1/models answered {status}")
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (OSError, http.client.HTTPException) as error:
        raise ServerFailed(f"nothing answers at {url}: {error}") from error
    except (msgspec.MsgspecError, LookupError, TypeError) as error:
        raise ServerFailed(f"{url}/v1/models is not a list of models") from error


class Sampler:
    """Reads the state of a server ten times a second until closed.

    It has no states of a server that serves none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.states: list[State] = []
        self._url = url
        self._api_key = api_key
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="state-sampler", daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._closing.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException, msgspec.MsgspecError):
                status, body = get(self._url, "/morph/v1/state", api_key=self._api_key)
                if status == 404:
                    return
                if status == 200:
                    self.states.append(msgspec.json.decode(body, type=State))
            due = max(due + _SAMPLE_INTERVAL_S, time.monotonic())
            self._closing.wait(due - time.monotonic())
