"""Log-probabilities of tokens, as completions and chats tell them."""

from collections.abc import Sequence
from dataclasses import dataclass

from morphserve.runtime.messages import TokenLogprobs
from morphserve.runtime.server.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)
from morphserve.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Scored:
    """A token of the output with its bytes, and the likeliest ones in its place."""

    token: bytes
    logprob: float
    top: Sequence[tuple[bytes, float]]
    offset: int  # characters of the choice's text before it


def score(tokenizer: Tokenizer, token: int, told: TokenLogprobs, offset: int) -> Scored:
    def read(token: int) -> bytes:
        return tokenizer.token_bytes(token, special_tokens=True)

    top = [(read(other), logprob) for other, logprob in told.top]
    return Scored(read(token), told.logprob, top, offset)


def completion_logprobs(scored: Sequence[Scored] | None) -> CompletionLogprobs | None:
    if scored is None:
        return None
    return CompletionLogprobs(
        tokens=[_text(entry.token) for entry in scored],
        token_logprobs=[entry.logprob for entry in scored],
        top_logprobs=[_by_text(entry) for entry in scored],
        text_offset=[entry.offset for entry in scored],
    )


def chat_logprobs(scored: Sequence[Scored] | None) -> ChatLogprobs | None:
    if scored is None:
        return None
    return ChatLogprobs(
        [
            TokenLogprob(
                _text(entry.token),
                entry.logprob,
                list(entry.token),
                [TopLogprob(_text(other), value, list(other)) for other, value in entry.top],
            )
            for entry in scored
        ]
    )


def _by_text(entry: Scored) -> dict[str, float]:
    """Of tokens that read the same, parts of characters mostly, the likeliest counts."""
    likeliest: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        likeliest.setdefault(_text(token), logprob)
    return likeliest


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
