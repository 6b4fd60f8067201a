"""From prompts to pieces of text: the engine's tokens, detokenised, stopped, counted and timed."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import chain

import msgspec

from morphserve.quantize.manifest import Variant
from morphserve.runtime.deliveries import Chunk
from morphserve.runtime.engine_client import (
    EngineClient,
    EngineDead,
    QueueTimeout,
    RequestRefused,
)
from morphserve.runtime.metrics import RequestTimer
from morphserve.runtime.request import Demands, FinishReason, SamplingParams
from morphserve.runtime.server.errors import broken_off
from morphserve.runtime.server.logprobs import Scored, score
from morphserve.runtime.server.responses import MorphUsage, PromptTokensDetails, Usage
from morphserve.runtime.server.stop import StopFinder
from morphserve.runtime.server.token_ids import TokenIds, token_ids
from morphserve.runtime.tokenizer import Tokenizer

_SOUND_ENDS = FinishReason.STOP, FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one choice that can be sent now. The last one has a finish reason."""

    index: int
    text: str
    finish_reason: str | None = None
    scored: Sequence[Scored] | None = None  # tokens since the last piece, if asked for
    told: TokenIds | None = None  # the same tokens as ids, if asked for

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing of an answer."""
        return not (self.text or self.scored or self.told and self.told.ids)


@dataclass(frozen=True, slots=True)
class TextRules:
    """How the text of a choice is made from its tokens."""

    stops: Sequence[str] = ()
    include_stop: bool = False  # what ended it, a stop string or token, is part of the text
    special_tokens: bool = False  # have a text


def _nobody_asks(_choice: int) -> None:
    pass


@dataclass(slots=True)
class Job:
    """One API request: prompts of token ids, and what has been spent on them.

    Choices are numbered prompt by prompt: those of the first one come first.
    """

    id: str
    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]  # of each prompt
    rules: TextRules
    timers: Sequence[RequestTimer]  # one for each choice
    choices_per_prompt: int = 1
    demands: Demands = Demands()
    tells_ids: bool = False  # of tokens, beside the text
    echo: Sequence[str] = ()  # texts of the prompts, if each choice is to begin with its prompt's
    morph: MorphUsage = field(default_factory=MorphUsage)
    cached_tokens: int = 0
    on_first_token: Callable[[int], None] = _nobody_asks  # told whenever tokens of a choice come

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.choices_per_prompt

    def prompt_of(self, choice: int) -> list[int]:
        return self.prompts[choice // self.choices_per_prompt]

    def params_of(self, choice: int) -> SamplingParams:
        """A seeded request's choices have the seeds seed, seed + 1, ... for each prompt."""
        prompt, more = divmod(choice, self.choices_per_prompt)
        params = self.params[prompt]
        if params.seed is None or not more:
            return params
        return msgspec.structs.replace(params, seed=params.seed + more)

    def opening_of(self, choice: int) -> str:
        return self.echo[choice // self.choices_per_prompt] if self.echo else ""

    def count(self, choice: int, chunk: Chunk) -> None:
        if choice % self.choices_per_prompt == 0:  # a prompt counts once, as in prompt_tokens
            self.cached_tokens += chunk.cached_tokens
        self.morph.queue_s = max(self.morph.queue_s, round(chunk.queued_s, 6))
        match chunk.precision:
            case Variant.FULL:
                self.morph.full += len(chunk.tokens)
            case Variant.INT8:
                self.morph.int8 += len(chunk.tokens)
            case Variant.INT4:
                self.morph.int4 += len(chunk.tokens)

    def usage(self) -> Usage:
        prompt = sum(map(len, self.prompts))
        completion = self.morph.full + self.morph.int8 + self.morph.int4
        return Usage(
            prompt,
            completion,
            prompt + completion,
            PromptTokensDetails(self.cached_tokens),
            self.morph,
        )


class Generator:
    """Runs jobs on the engine."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def run(self, job: Job) -> AsyncGenerator[Piece]:
        """Pieces of all choices as they come; closing it early aborts what still runs.

        Raises EngineDead, RequestRefused or QueueTimeout before the first piece, and ApiError if
        the server breaks a choice off.
        """
        choices = [self._choice(job, index) for index in range(job.num_choices)]
        return choices[0] if len(choices) == 1 else _merge(choices)

    async def _choice(self, job: Job, index: int) -> AsyncGenerator[Piece]:
        timer, text = job.timers[index], TextStream(self._tokenizer, job, index)
        reason: FinishReason | None = FinishReason.ABORT  # unless it comes to an end
        try:
            async with aclosing(self._chunks(job, index)) as lists:  # a stop string aborts, too
                async for chunks in lists:
                    job.on_first_token(index)
                    piece = joined(list(_read(chunks, job, text, timer)))
                    if text.finish_reason is not None:
                        break
                    if not piece.is_empty:
                        yield piece
            reason = text.finish_reason
            assert reason is not None, "the engine client ends every request"
            if reason not in _SOUND_ENDS:
                if not piece.is_empty:
                    yield replace(piece, finish_reason=None)  # of tokens that came before that
                raise broken_off(reason)
            yield piece
        except (EngineDead, QueueTimeout, RequestRefused):
            reason = None
            raise
        finally:
            if reason is not None:
                timer.finish(reason.value, f"{job.id}-{index}", len(job.prompt_of(index)))

    def _chunks(self, job: Job, index: int) -> AsyncGenerator[list[Chunk]]:
        return self._engine.generate(
            f"{job.id}-{index}", job.prompt_of(index), job.params_of(index), job.demands
        )


class TextStream:
    """Text of one choice, cut at its stop strings."""

    def __init__(self, tokenizer: Tokenizer, job: Job, index: int) -> None:
        self.index = index
        self._tokenizer = tokenizer
        self._rules = job.rules
        self._detokenizer = tokenizer.detokenizer(
            job.prompt_of(index), special_tokens=job.rules.special_tokens
        )
        self._stop = StopFinder(job.rules.stops, include=job.rules.include_stop)
        self._opening = job.opening_of(index)
        self._tells_ids = job.tells_ids
        self._prompt: list[int] | None = job.prompt_of(index)  # until it was told
        self._num_chars = 0  # of the tokens so far, sent or held back
        self.finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk) -> Piece:
        """What to send for this chunk; sets `finish_reason` when it is the last.

        Nothing, if the answer breaks off with it: no echo, and nothing that was held back.
        """
        if chunk.finish_reason is not None and chunk.finish_reason not in _SOUND_ENDS:
            self.finish_reason = chunk.finish_reason
            return Piece(self.index, "", chunk.finish_reason.value)
        offsets: list[int] = []
        text = self._opening + self._text(chunk, offsets)
        self._opening = ""
        reason = self.finish_reason
        scored = None
        if chunk.logprobs is not None:
            entries = zip(chunk.tokens, chunk.logprobs, offsets, strict=True)
            scored = [score(self._tokenizer, *entry) for entry in entries]
        told, self._prompt = token_ids(chunk, self._prompt) if self._tells_ids else None, None
        return Piece(self.index, text, None if reason is None else reason.value, scored, told)

    def _text(self, chunk: Chunk, offsets: list[int]) -> str:
        """Appends to `offsets` where in the text each token of the chunk begins."""
        ended = chunk.finish_reason is FinishReason.STOP
        silent = len(chunk.tokens) - 1 if ended and not self._rules.include_stop else None
        new = ""
        for place, token in enumerate(chunk.tokens):
            offsets.append(self._num_chars)
            if place != silent:
                read = self._detokenizer.add([token])
                self._num_chars += len(read)
                new += read
        return self._cut(new, chunk.finish_reason)

    def _cut(self, new: str, reason: FinishReason | None) -> str:
        text = self._stop.add(new)
        if reason is not None and not self._stop.found:
            text += self._stop.add(self._detokenizer.finish())
        if self._stop.found:
            self.finish_reason = FinishReason.STOP
            return text
        self.finish_reason = reason
        return text if reason is None else text + self._stop.finish()


def _read(
    chunks: Sequence[Chunk], job: Job, text: TextStream, timer: RequestTimer
) -> Iterator[Piece]:
    """A piece of each chunk up to the choice's end: nothing behind a stop string is answer."""
    for chunk in chunks:
        job.count(text.index, chunk)
        timer.tokens(len(chunk.tokens), chunk.at_s, chunk.precision, chunk.queued_s)
        yield text.add(chunk)
        if text.finish_reason is not None:
            break


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one choice, in their order, as one."""
    first, *more = pieces
    scored = [piece.scored for piece in pieces if piece.scored is not None]
    for piece in more:
        if first.told is not None and piece.told is not None:
            first.told.add(piece.told)
    return Piece(
        first.index,
        "".join([piece.text for piece in pieces]),
        pieces[-1].finish_reason,
        list(chain.from_iterable(scored)) if scored else None,
        first.told,
    )


async def whole(pieces: AsyncGenerator[Piece], num_choices: int) -> list[Piece]:
    """All pieces of each choice as one."""
    choices: list[list[Piece]] = [[] for _ in range(num_choices)]
    async with aclosing(pieces):
        async for piece in pieces:
            choices[piece.index].append(piece)
    return [joined(choice) for choice in choices]


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
