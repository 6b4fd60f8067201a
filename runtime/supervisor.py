"""The engine process, started, watched, and started again when it dies."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from morphserve.configs.schema import EngineConfig
from morphserve.runtime.engine_client import EngineClient, EngineDead, StartRefused

# -P: a file in the user's folder named like a module of ours must not be imported.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "morphserve.runtime.engine_process")
MAX_DEATHS = 5  # in a row, without a minute of service between them, before giving up
GOOD_SERVICE_S = 60.0  # after this a death is the first again
FIRST_BACKOFF_S = 0.5  # before the second start in a row; the first is at once
MAX_BACKOFF_S = 30.0
_ENGINE_VARIABLES = {
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads must sleep: the HTTP process needs the cores too
    "OPENBLAS_NUM_THREADS": "1",  # numpy comes with torch and is never asked to multiply
}
_EXIT_S = 0.5  # for an engine that was told to stop; it has nothing to save
_STACK_S = 2.0  # for a stuck engine to write down where it stands
_PATIENCE = 10  # times its first start may a restart take, if that is longer than the time-out
_LOOKS = 20  # of the watchdog within its time-out


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A started engine process and our end of the socket to it."""

    sock: socket.socket
    process: subprocess.Popen[bytes]

    async def wait(self, timeout_s: float) -> int:
        """Its exit code; killed if it does not end by itself in time."""
        try:
            return await asyncio.to_thread(self.process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def launch_engine(command: Sequence[str] = ENGINE_COMMAND) -> EngineProcess:
    """Starts the engine process; it loads no model before EngineClient.start() sends its config."""
    ours, theirs = socket.socketpair()
    # Own session: Ctrl-C on the terminal reaches the HTTP process only, which decides.
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | _ENGINE_VARIABLES,
            start_new_session=True,
        )
    return EngineProcess(ours, process)


def backoff_s(num_deaths: int) -> float:
    """Wait before the start that follows so many deaths in a row."""
    if num_deaths <= 1:
        return 0.0
    return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (num_deaths - 2))


class Supervisor:
    """Owns the engine process; its client stays the same however often the process is replaced."""

    def __init__(
        self, config: EngineConfig, timeout_s: float, command: Sequence[str] = ENGINE_COMMAND
    ) -> None:
        """`timeout_s`: an engine that says nothing for so long is taken for stuck."""
        self._config = config
        self._timeout_s = timeout_s
        self._command = command
        self._start_s = 0.0  # that the latest start took
        self._process = launch_engine(command)
        self.client = EngineClient(self._process.sock, self._process.wait)

    async def start(self) -> None:
        """Returns when the engine serves for the first time; raises MorphError if it cannot."""
        started = time.monotonic()
        await self.client.start(self._config)
        self._start_s = self.client.retry_after_s = time.monotonic() - started

    async def run(self) -> None:
        """Starts the engine again whenever it dies; returns when that is of no use any more."""
        num_deaths = 0
        while True:
            served_s = await self._until_death()
            num_deaths = 1 if served_s >= GOOD_SERVICE_S else num_deaths + 1
            wait_s = backoff_s(num_deaths)
            self.client.note(f"{self.client.failure} ({num_deaths} of {MAX_DEATHS} times in a row)")
            if num_deaths >= MAX_DEATHS:
                return
            try:
                await self._start_again(wait_s)
            except StartRefused:
                return
            except EngineDead:
                continue  # while it loaded: one more death

    async def close(self) -> None:
        """Ends the engine process, whatever it is doing."""
        await self.client.close()
        await self._process.wait(_EXIT_S)

    async def _until_death(self) -> float:
        """Seconds until the engine had died, by itself or as it was stuck.

        Silence is counted in looks, so that a pause of this process is none of the engine's.
        """
        started, silent_looks, num_heard = time.monotonic(), 0, -1
        while not await _happens(self.client.died, self._timeout_s / _LOOKS):
            silent_looks = silent_looks + 1 if self.client.num_heard == num_heard else 0
            num_heard = self.client.num_heard
            if silent_looks >= _LOOKS:
                await self._kill()
        served_s = time.monotonic() - started
        await self._process.wait(_EXIT_S)
        return served_s

    async def _kill(self) -> None:
        """Ends a stuck engine, which first writes into the log where it stands."""
        self.client.condemn(f"the engine said nothing for {self._timeout_s:g} s and was killed")
        self._process.process.send_signal(signal.SIGABRT)
        await self._process.wait(_STACK_S)

    async def _start_again(self, wait_s: float) -> None:
        """Raises EngineDead, or StartRefused with the engine's own sentence."""
        self.client.retry_after_s = wait_s + self._start_s
        await asyncio.sleep(wait_s)
        started = time.monotonic()
        self._process = launch_engine(self._command)
        self.client.attach(self._process.sock, self._process.wait)
        try:
            async with asyncio.timeout(max(self._timeout_s, _PATIENCE * self._start_s)):
                await self.client.start(self._config)
        except TimeoutError:
            self._process.process.kill()
            raise EngineDead("the engine did not start in time") from None
        self._start_s = time.monotonic() - started
        self.client.note(f"the engine serves again, {self._start_s:.1f} s after it was started")


async def _happens(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether it does within so many seconds."""
    try:
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    except TimeoutError:
        return False
