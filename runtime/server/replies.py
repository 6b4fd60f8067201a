"""Pieces of text as completions or chat completions, whole or in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import UNSET

from morphserve.runtime.server.generation import Piece
from morphserve.runtime.server.logprobs import chat_logprobs, completion_logprobs
from morphserve.runtime.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    Completion,
    CompletionChoice,
    OutputIds,
    Precisions,
    PromptIds,
    Usage,
    encode,
)


class Reply(Protocol):
    """One kind of answer; all results are JSON."""

    def opening(self, num_choices: int, usage: Usage | None) -> list[bytes]:
        """Chunks before the first piece."""
        ...

    def chunk(self, piece: Piece, usage: Usage | None) -> bytes: ...

    def closing(self, usage: Usage) -> bytes:
        """The chunk that says what the stream has cost."""
        ...

    def whole(self, choices: Sequence[Piece], usage: Usage) -> bytes: ...


@dataclass(frozen=True, slots=True)
class CompletionReply:
    id: str
    created: int  # seconds since the epoch
    model: str

    def opening(self, num_choices: int, usage: Usage | None) -> list[bytes]:
        return []

    def chunk(self, piece: Piece, usage: Usage | None) -> bytes:
        return self._encode([piece], usage)

    def closing(self, usage: Usage) -> bytes:
        return self._encode([], usage)

    def whole(self, choices: Sequence[Piece], usage: Usage) -> bytes:
        return self._encode(choices, usage)

    def _encode(self, pieces: Sequence[Piece], usage: Usage | None) -> bytes:
        choices = [
            CompletionChoice(
                piece.index,
                piece.text,
                piece.finish_reason,
                completion_logprobs(piece.scored),
                _prompt_ids(piece),
                *_output_ids(piece),
            )
            for piece in pieces
        ]
        return encode(Completion(self.id, self.created, self.model, choices, usage))


@dataclass(frozen=True, slots=True)
class ChatReply:
    id: str
    created: int  # seconds since the epoch
    model: str
    prompt_ids: PromptIds = UNSET

    def opening(self, num_choices: int, usage: Usage | None) -> list[bytes]:
        delta = ChatDelta(role="assistant", content="")
        return [
            self._encode([ChatChunkChoice(i, delta)], usage, UNSET if i else self.prompt_ids)
            for i in range(num_choices)
        ]

    def chunk(self, piece: Piece, usage: Usage | None) -> bytes:
        delta, logprobs = ChatDelta(content=piece.text or None), chat_logprobs(piece.scored)
        ids = _output_ids(piece)
        choice = ChatChunkChoice(piece.index, delta, piece.finish_reason, logprobs, *ids)
        return self._encode([choice], usage)

    def closing(self, usage: Usage) -> bytes:
        return self._encode([], usage)

    def whole(self, choices: Sequence[Piece], usage: Usage) -> bytes:
        answers = [
            ChatChoice(
                piece.index,
                AssistantMessage(piece.text),
                piece.finish_reason,
                chat_logprobs(piece.scored),
                *_output_ids(piece),
            )
            for piece in choices
        ]
        answer = ChatCompletion(self.id, self.created, self.model, answers, usage)
        answer.prompt_token_ids = self.prompt_ids
        return encode(answer)

    def _encode(
        self, choices: list[ChatChunkChoice], usage: Usage | None, prompt_ids: PromptIds = UNSET
    ) -> bytes:
        chunk = ChatChunk(self.id, self.created, self.model, choices, usage)
        chunk.prompt_token_ids = prompt_ids
        return encode(chunk)


def _prompt_ids(piece: Piece) -> PromptIds:
    told = piece.told
    return UNSET if told is None or told.prompt is None else told.prompt


def _output_ids(piece: Piece) -> tuple[OutputIds, Precisions]:
    told = piece.told
    return (UNSET, UNSET) if told is None else (told.ids, told.precisions)
