"""The HTTP process's side of the engine: requests out, tokens back, and news of its health."""

import asyncio
import signal
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec

from morphserve.configs.errors import MorphError
from morphserve.configs.schema import EngineConfig
from morphserve.runtime.deliveries import Chunk, Deliveries
from morphserve.runtime.frames import FrameSplitter, FrameTooLarge, encode_frame
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
)
from morphserve.runtime.request import Demands, FinishReason, SamplingParams

KEPT_EVENTS = 1000
MAX_UNREAD_BYTES = 16 << 20  # towards the engine; a step later it has read them
KEPT_SNAPSHOTS = 32  # the last three seconds
_READ_BYTES = 1 << 18
_NO_DEMANDS = Demands()
_EXIT_S = 1.0  # from closing its socket to the engine's end


class EngineDead(MorphError):
    """The engine process is gone; no request can be served."""


class StartRefused(EngineDead):
    """The engine cannot start, and says why: starting it again would not help."""


class QueueTimeout(MorphError):
    """The engine has given up a request that waited too long; nothing of it was computed."""


class RequestRefused(MorphError):
    """The engine cannot ever take this request; the message has the numbers."""


class EngineClient:
    """Talks to one engine, and after its death to the next. Lives in one event loop.

    What waits here is bounded: for each request in flight at most its max_tokens chunks, and
    towards the engine what `is_behind` looks at.
    """

    snapshot: Snapshot  # the latest; there is one once start() has returned
    hello: Hello

    def __init__(
        self, sock: socket.socket, exit_code: Callable[[float], Awaitable[int]] | None = None
    ) -> None:
        """`exit_code` waits so many seconds for the process to end."""
        self.died = asyncio.Event()  # set until the engine, or the next one, serves
        self.events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self.snapshots: deque[Snapshot] = deque(maxlen=KEPT_SNAPSHOTS)  # the latest, oldest first
        self.news = asyncio.Event()  # set when events come, and replaced by a fresh one
        self.failure = "the engine process ended unexpectedly"
        self.held_rung: int | None = None  # an administrator's pin; it outlives the engine
        self.num_starts = 0
        self.num_heard = 0  # messages from the engine
        self.retry_after_s = 1.0  # what a client should wait while the engine is dead
        self._num_events = 0
        self._deliveries = Deliveries()
        self.attach(sock, exit_code)

    def attach(
        self, sock: socket.socket, exit_code: Callable[[float], Awaitable[int]] | None = None
    ) -> None:
        """Turns to a new engine process, which start() then waits for."""
        self._sock = sock
        self._exit_code = exit_code
        self._writer: asyncio.StreamWriter | None = None  # before start()
        self._greeted: asyncio.Future[None] | None = None

    @property
    def restarts(self) -> int:
        """Times that an engine serves or served in a dead one's place."""
        return max(0, self.num_starts - 1)

    @property
    def is_behind(self) -> bool:
        """Whether the engine has left too much unread to be sent more requests."""
        return self._writer is not None and (
            self._writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES
        )

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._deliveries)

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
    ) -> AsyncGenerator[list[Chunk]]:
        """The request's chunks, in lists of what came meanwhile; leaving early aborts it.

        Raises EngineDead, RequestRefused or QueueTimeout before the first token. If the engine
        dies later, the last chunk has finish reason `error`.
        """
        if self.died.is_set():
            raise EngineDead(self.failure)
        mailbox = self._deliveries.open(request_id)
        try:
            self._send(Submit(request_id, prompt, params, demands))
            submitted, begun, finished = time.monotonic(), False, False
            while not finished:
                chunks = await mailbox.take()
                reason = chunks[-1].finish_reason
                if reason is FinishReason.TIMEOUT:
                    wait_s = time.monotonic() - submitted
                    raise QueueTimeout(f"the request waited {wait_s:.1f} s in the queue")
                begun = begun or any(chunk.tokens for chunk in chunks)
                if reason is FinishReason.ERROR and self.died.is_set() and not begun:
                    raise EngineDead(self.failure)
                finished = reason is not None
                yield chunks
        finally:
            if self._deliveries.close(request_id):
                self._send(Abort(request_id))

    def pin(self, rung: int | None) -> None:
        """Asks the engine to hold a rung; None: to let the controller decide again."""
        self.held_rung = rung
        self._send(Pin(rung))

    def abort_all(self) -> None:
        """Ends every request in flight with finish reason `abort`."""
        for request_id in self._deliveries:
            self._deliveries.finish(request_id, FinishReason.ABORT)
            self._send(Abort(request_id))

    async def close(self) -> None:
        """Tells the engine to stop and hangs up. Requests in flight end with `abort`."""
        if self._writer is None:
            return self._sock.close()
        self.abort_all()
        self._send(Shutdown())
        self._listener.cancel()
        self._writer.close()
        await asyncio.gather(self._listener, return_exceptions=True)

    def condemn(self, why: str) -> None:
        """Treats the engine as dead, whatever it may still say."""
        self._listener.cancel()
        self.failure = why
        self._end(None)

    def note(self, text: str) -> None:
        """Adds an event of kind `engine`."""
        self._keep(Event(0, time.time(), "engine", text))

    def _keep(self, event: Event) -> None:
        # Numbered here: ids go on counting when the next engine begins with 1 again.
        self._num_events += 1
        self.events.append(msgspec.structs.replace(event, id=self._num_events))
        self.news.set()
        self.news = asyncio.Event()

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self.died.is_set():
            self._writer.write(encode_frame(message))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        failed = await self._receive_all(reader)
        if failed is None and self._exit_code is not None:
            self.failure = f"the engine process {_ending(await self._exit_code(_EXIT_S))}"
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
                    self.num_heard += 1
                    failed = message if isinstance(message, Failed) else failed
                    self._receive(message)
        except OSError:
            pass  # a reset is the end, like a close
        except (FrameTooLarge, msgspec.MsgspecError) as error:
            failed = Failed(f"the engine sent what cannot be read: {error}", 1)
        return failed

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Step():
                self._deliveries.deliver(message)
            case Snapshot():
                self.snapshot = message
                self.snapshots.append(message)
                if self._greeted is not None and not self._greeted.done():
                    self._serve()
            case Events():
                for event in message.events:
                    self._keep(event)
            case Refused():
                self._deliveries.fail(message.request_id, RequestRefused(message.message))
            case Hello():
                self.hello = message

    def _serve(self) -> None:
        assert self._greeted is not None
        self.died.clear()
        if self.held_rung is not None:
            self._send(Pin(self.held_rung))
        self.num_starts += 1
        self._greeted.set_result(None)

    def _end(self, failed: Failed | None) -> None:
        """The engine is gone: nobody may wait for it."""
        if failed is not None:
            self.failure = failed.message
        self.died.set()
        if self._writer is not None:
            self._writer.close()
        if self._greeted is not None and not self._greeted.done():
            error = StartRefused(self.failure) if failed else EngineDead(self.failure)
            error.exit_code = failed.exit_code if failed else 1
            self._greeted.set_exception(error)
        elif self.num_starts:
            self.snapshot = _after_death(self.snapshot)
            self.snapshots.clear()
            self.snapshots.append(self.snapshot)
        for request_id in self._deliveries:
            self._deliveries.finish(request_id, FinishReason.ERROR)


def _after_death(last: Snapshot) -> Snapshot:
    """What is left of an engine's numbers when its process has gone."""
    return msgspec.structs.replace(
        last,
        running=0,
        waiting=0,
        held=0,
        oldest_wait_s=0.0,
        demand=0,
        blocks_used=0,
        blocks_cached=0,
        arrivals_per_s=0.0,
        swapping={},
    )


def _ending(exit_code: int) -> str:
    """How a process came to its end."""
    if exit_code >= 0:
        return f"ended unexpectedly with exit code {exit_code}"
    guess = " (out of memory?)" if -exit_code == signal.SIGKILL else ""
    return f"was killed by signal {-exit_code}{guess}"
