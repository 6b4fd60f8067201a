"""From prompts to pieces of text: the engine's tokens, detokenised, stopped, counted and timed."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from morphserve.quantize.manifest import Variant
from morphserve.runtime.engine_client import Chunk, EngineClient, EngineDead, RequestRefused
from morphserve.runtime.metrics import RequestTimer
from morphserve.runtime.request import FinishReason, SamplingParams
from morphserve.runtime.server.errors import broken_off
from morphserve.runtime.server.protocol import MorphUsage, Usage
from morphserve.runtime.server.stop import StopFinder
from morphserve.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one choice that can be sent now. The last one has a finish reason."""

    index: int
    text: str
    finish_reason: str | None = None


@dataclass(slots=True)
class Job:
    """One API request: prompts of token ids, and what has been spent on them."""

    id: str
    prompts: Sequence[list[int]]
    params: SamplingParams
    stops: Sequence[str]
    timers: Sequence[RequestTimer]  # one for each prompt
    tokens: MorphUsage = field(default_factory=MorphUsage)

    def count(self, chunk: Chunk) -> None:
        match chunk.precision:
            case Variant.FULL:
                self.tokens.full += len(chunk.tokens)
            case Variant.INT8:
                self.tokens.int8 += len(chunk.tokens)
            case Variant.INT4:
                self.tokens.int4 += len(chunk.tokens)

    def usage(self) -> Usage:
        prompt = sum(map(len, self.prompts))
        completion = self.tokens.full + self.tokens.int8 + self.tokens.int4
        return Usage(prompt, completion, prompt + completion, self.tokens)


class Generator:
    """Runs jobs on the engine."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def run(self, job: Job) -> AsyncGenerator[Piece]:
        """Pieces of all choices as they come; closing it early aborts what still runs.

        Raises EngineDead or RequestRefused before the first piece, and ApiError if the server
        breaks a choice off.
        """
        choices = [self._choice(job, index) for index in range(len(job.prompts))]
        return choices[0] if len(choices) == 1 else _merge(choices)

    async def _choice(self, job: Job, index: int) -> AsyncGenerator[Piece]:
        timer, text = job.timers[index], TextStream(self._tokenizer, job, index)
        reason: FinishReason | None = FinishReason.ABORT  # unless it comes to an end
        chunks = self._engine.generate(f"{job.id}-{index}", job.prompts[index], job.params)
        try:
            async with aclosing(chunks):  # a stop string ends the request in the engine, too
                async for chunk in chunks:
                    job.count(chunk)
                    timer.tokens(len(chunk.tokens), chunk.precision, chunk.queued_s)
                    piece = text.add(chunk)
                    if text.finish_reason is not None:
                        break
                    if piece:
                        yield Piece(index, piece)
            reason = text.finish_reason
            assert reason is not None, "the engine client ends every request"
            if reason in (FinishReason.ABORT, FinishReason.ERROR):
                raise broken_off(reason)
            yield Piece(index, piece, reason.value)
        except (EngineDead, RequestRefused):
            reason = None
            raise
        finally:
            if reason is not None:
                timer.finish(reason.value, f"{job.id}-{index}", len(job.prompts[index]))


class TextStream:
    """Text of one choice, cut at its stop strings."""

    def __init__(self, tokenizer: Tokenizer, job: Job, index: int) -> None:
        self._detokenizer = tokenizer.detokenizer(job.prompts[index])
        self._stop = StopFinder(job.stops)
        self._silent = frozenset(job.params.stop_token_ids)
        self.finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk) -> str:
        """The text to send for this chunk; sets `finish_reason` when it is the last."""
        tokens = chunk.tokens
        if chunk.finish_reason is FinishReason.STOP and tokens and tokens[-1] in self._silent:
            tokens = tokens[:-1]
        text = self._stop.add(self._detokenizer.add(tokens))
        if chunk.finish_reason is not None and not self._stop.found:
            text += self._stop.add(self._detokenizer.finish())
        if self._stop.found:
            self.finish_reason = FinishReason.STOP
            return text
        self.finish_reason = chunk.finish_reason
        return text if chunk.finish_reason is None else text + self._stop.finish()


async def _merge(sources: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    """Pieces of all sources as they come; the first exception ends all of them."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(source, queue)) for source in sources]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    source: AsyncGenerator[Piece], queue: asyncio.Queue[Piece | Exception | None]
) -> None:
    """Moves a source into the queue, then None, or the exception that ended it."""
    try:
        async with aclosing(source):
            async for piece in source:
                queue.put_nowait(piece)
        queue.put_nowait(None)
    except Exception as error:  # raised again by the reader
        queue.put_nowait(error)
