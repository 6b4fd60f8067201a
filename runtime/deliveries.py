"""Tokens on their way from the engine to whoever waits for them in the HTTP process."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

from morphserve.quantize.manifest import Variant
from morphserve.runtime.messages import Step, TokenLogprobs, TokenOutput
from morphserve.runtime.request import FinishReason

PIECES_PER_S = 2000  # of all answers together: each costs the HTTP process and its client
MAX_PACE_S = 0.04  # between two pieces of one answer, where the engine is faster


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one request. The last chunk has a finish reason."""

    tokens: list[int]
    precision: Variant  # lowest of any layer in the step that made them
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None  # one per token, if asked for
    cached_tokens: int = 0  # prompt tokens whose KV was there; told with the first token
    queued_s: float = 0.0  # submitted to first scheduled; told with the first token
    at_s: float = 0.0  # when it came, by time.monotonic


class Mailbox:
    """What has come for one request and was not taken yet."""

    def __init__(self) -> None:
        self.is_new = True  # nothing has come yet
        self._chunks: list[Chunk] = []
        self._error: Exception | None = None
        self._due = asyncio.Event()

    def put(self, chunk: Chunk) -> None:
        """Its reader sleeps on until `wake`."""
        self.is_new = False
        self._chunks.append(chunk)

    def wake(self) -> None:
        if self._chunks:  # the reader may have taken them when it was woken for those before
            self._due.set()

    def fail(self, error: Exception) -> None:
        """Nothing comes any more: it is raised where chunks are waited for."""
        self._error = error
        self._due.set()

    async def take(self) -> list[Chunk]:
        """One chunk or more, in their order."""
        await self._due.wait()
        self._due.clear()
        if self._error is not None:
            raise self._error
        chunks, self._chunks = self._chunks, []
        return chunks


class Deliveries:
    """The mailboxes of all requests in flight. Lives in one event loop.

    A request's first token is handed on at once, and so is what the engine ends it with. What comes
    between waits until `pace_s` after the last time: where steps are slower than that, nothing
    waits; where they are faster, a piece of an answer holds several tokens, and the cores are left
    to the engine.
    """

    def __init__(self) -> None:
        self._boxes: dict[str, Mailbox] = {}
        self._resting: asyncio.TimerHandle | None = None  # since readers were woken
        self._sleeping: dict[Mailbox, None] = {}  # those that something has come for since then

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._boxes)

    def __iter__(self) -> Iterator[str]:
        """Their ids, at this moment."""
        return iter(list(self._boxes))

    @property
    def pace_s(self) -> float:
        num_answered = sum(not box.is_new for box in self._boxes.values())
        return min(num_answered / PIECES_PER_S, MAX_PACE_S)

    def open(self, request_id: str) -> Mailbox:
        box = self._boxes[request_id] = Mailbox()
        return box

    def close(self, request_id: str) -> bool:
        """Nobody reads it any more; whether it was still in flight."""
        return self._boxes.pop(request_id, None) is not None

    def deliver(self, step: Step) -> None:
        now_s = time.monotonic()
        for output in step.outputs:
            if box := self._boxes.get(output.request_id):  # else it was aborted meanwhile
                self._put(box, output, step.precision, now_s)
        if self._sleeping and self._resting is None:
            self._wake()

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """Ends a request that the engine no longer speaks of."""
        box = self._boxes.pop(request_id)
        box.put(Chunk([], Variant.FULL, reason, at_s=time.monotonic()))
        box.wake()

    def fail(self, request_id: str, error: Exception) -> None:
        """As `Mailbox.fail`."""
        if box := self._boxes.pop(request_id, None):
            box.fail(error)

    def _put(self, box: Mailbox, output: TokenOutput, precision: Variant, now_s: float) -> None:
        reason = None if output.finish_reason is None else FinishReason(output.finish_reason)
        hurries = box.is_new or reason is not None
        box.put(
            Chunk(
                output.tokens,
                precision,
                reason,
                output.logprobs,
                output.cached_tokens,
                output.queued_s,
                now_s,
            )
        )
        if reason is not None:
            del self._boxes[output.request_id]
        if hurries:
            box.wake()
        else:
            self._sleeping[box] = None

    def _wake(self) -> None:
        """Wakes the readers that something has come for, and lets them rest from then on."""
        for box in self._sleeping:
            box.wake()
        self._sleeping.clear()
        self._resting = asyncio.get_running_loop().call_later(self.pace_s, self._end_rest)

    def _end_rest(self) -> None:
        self._resting = None
        if self._sleeping:
            self._wake()
