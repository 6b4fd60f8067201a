"""The HTTP process's side of the engine: requests out, tokens back, and news of its health."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from morphserve.configs.errors import MorphError
from morphserve.configs.schema import EngineConfig
from morphserve.quantize.manifest import Variant
from morphserve.runtime.frames import FrameSplitter, encode_frame
from morphserve.runtime.messages import (
    Abort,
    Event,
    Events,
    Failed,
    FromEngine,
    Hello,
    Pin,
    Refused,
    Shutdown,
    Snapshot,
    Step,
    Submit,
    ToEngine,
    TokenLogprobs,
    TokenOutput,
)
from morphserve.runtime.request import Demands, FinishReason, SamplingParams

# -P: a file in the user's folder named like a module of ours must not be imported.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "morphserve.runtime.engine_process")
KEPT_EVENTS = 1000
_READ_BYTES = 1 << 18
_NO_DEMANDS = Demands()
_EXIT_S = 1.0  # from closing its socket to the engine's end


class EngineDead(MorphError):
    """The engine process is gone; no request can be served."""


class RequestRefused(MorphError):
    """The engine cannot ever take this request; the message has the numbers."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one request. The last chunk has a finish reason."""

    tokens: list[int]
    precision: Variant  # lowest of any layer in the step that made them
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None  # one per token, if asked for
    cached_tokens: int = 0  # prompt tokens whose KV was there; told with the first token


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
    """Starts the engine process; it loads nothing before EngineClient.start() sends its config."""
    ours, theirs = socket.socketpair()
    # Own session: Ctrl-C on the terminal reaches the HTTP process only, which decides.
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            # Idle OpenMP threads must sleep: the HTTP process needs the cores too.
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            start_new_session=True,
        )
    return EngineProcess(ours, process)


class EngineClient:
    """Talks to one engine. Lives in one event loop."""

    snapshot: Snapshot  # the latest; there is one once start() has returned
    hello: Hello

    def __init__(
        self, sock: socket.socket, exit_code: Callable[[float], Awaitable[int]] | None = None
    ) -> None:
        """`exit_code` waits so many seconds for the process to end."""
        self.died = asyncio.Event()
        self.events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self.news = asyncio.Event()  # set when events come, and replaced by a fresh one
        self.failure = "the engine process ended unexpectedly"
        self._sock = sock
        self._exit_code = exit_code
        self._queues: dict[str, asyncio.Queue[Chunk | RequestRefused]] = {}
        self._writer: asyncio.StreamWriter | None = None  # before start()
        self._greeted: asyncio.Future[None] | None = None

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._queues)

    async def start(self, config: EngineConfig) -> Hello:
        """Sends the config and waits until the engine serves.

        Raises MorphError with the engine's own sentence and exit code if it cannot.
        """
        reader, self._writer = await asyncio.open_unix_connection(sock=self._sock)
        self._greeted = asyncio.get_running_loop().create_future()
        self._listener = asyncio.create_task(self._listen(reader))
        self._writer.write(encode_frame(config))
        await self._greeted
        return self.hello

    async def generate(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        demands: Demands = _NO_DEMANDS,
    ) -> AsyncGenerator[Chunk]:
        """The request's chunks as the engine makes them; leaving early aborts it.

        Raises EngineDead or RequestRefused before the first chunk. If the engine dies later, the
        last chunk has finish reason `error`.
        """
        if self.died.is_set():
            raise EngineDead(self.failure)
        queue: asyncio.Queue[Chunk | RequestRefused] = asyncio.Queue()
        self._queues[request_id] = queue
        try:
            self._send(Submit(request_id, prompt, params, demands))
            finished = False
            while not finished:
                chunk = await queue.get()
                if isinstance(chunk, RequestRefused):
                    raise chunk
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            if self._queues.pop(request_id, None) is not None:
                self._send(Abort(request_id))

    def pin(self, rung: int | None) -> None:
        """Asks the engine to hold a rung; None: to let the controller decide again."""
        self._send(Pin(rung))

    def abort_all(self) -> None:
        """Ends every request in flight with finish reason `abort`."""
        for request_id in list(self._queues):
            self._finish(request_id, FinishReason.ABORT)
            self._send(Abort(request_id))

    async def close(self) -> None:
        """Tells the engine to stop and hangs up. Requests in flight end with `abort`."""
        if self._writer is None:
            return self._sock.close()
        self.abort_all()
        self._send(Shutdown())
        self._listener.cancel()
        self._writer.close()
        await asyncio.gather(self._listener, self._writer.wait_closed(), return_exceptions=True)

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self.died.is_set():
            self._writer.write(encode_frame(message))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        failed: Failed | None = None
        try:
            failed = await self._receive_all(reader)
            if failed is None and self._exit_code is not None:
                self.failure = f"the engine process {_ending(await self._exit_code(_EXIT_S))}"
        finally:
            self._end(failed)

    async def _receive_all(self, reader: asyncio.StreamReader) -> Failed | None:
        """Takes messages until the engine hangs up; its last words, if there are any."""
        decoder = msgspec.msgpack.Decoder(FromEngine)
        splitter = FrameSplitter()
        failed: Failed | None = None
        try:
            while data := await reader.read(_READ_BYTES):
                for body in splitter.feed(data):
                    message = decoder.decode(body)
                    failed = message if isinstance(message, Failed) else failed
                    self._receive(message)
        except OSError:
            pass  # a reset is the end, like a close
        return failed

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Step():
                for output in message.outputs:
                    self._deliver(output, message.precision)
            case Snapshot():
                self.snapshot = message
                if self._greeted is not None and not self._greeted.done():
                    self._greeted.set_result(None)
            case Events():
                self.events.extend(message.events)
                self.news.set()
                self.news = asyncio.Event()
            case Refused():
                if queue := self._queues.pop(message.request_id, None):
                    queue.put_nowait(RequestRefused(message.message))
            case Hello():
                self.hello = message

    def _deliver(self, output: TokenOutput, precision: Variant) -> None:
        queue = self._queues.get(output.request_id)
        if queue is None:
            return  # aborted here while the engine was still at it
        reason = None if output.finish_reason is None else FinishReason(output.finish_reason)
        if reason is not None:
            del self._queues[output.request_id]
        queue.put_nowait(
            Chunk(output.tokens, precision, reason, output.logprobs, output.cached_tokens)
        )

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        self._queues.pop(request_id).put_nowait(Chunk([], Variant.FULL, reason))

    def _end(self, failed: Failed | None) -> None:
        """The engine is gone: nobody may wait for it."""
        if failed is not None:
            self.failure = failed.message
        self.died.set()
        if self._greeted is not None and not self._greeted.done():
            error = EngineDead(self.failure)
            error.exit_code = failed.exit_code if failed else 1
            self._greeted.set_exception(error)
        for request_id in list(self._queues):
            self._finish(request_id, FinishReason.ERROR)


def _ending(exit_code: int) -> str:
    """How a process came to its end."""
    if exit_code >= 0:
        return f"ended unexpectedly with exit code {exit_code}"
    guess = " (out of memory?)" if -exit_code == signal.SIGKILL else ""
    return f"was killed by signal {-exit_code}{guess}"
