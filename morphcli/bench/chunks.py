"""What servers stream: the events of completions and of chats."""

import msgspec


class MorphUsage(msgspec.Struct):
    full: int | None = None
    int4: int | None = None
    queue_s: float | None = None


class Usage(msgspec.Struct):
    completion_tokens: int = 0
    morph: MorphUsage | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None  # what is thought before it is said
    reasoning: str | None = None  # the same, in other servers

    @property
    def text(self) -> str:
        return self.content or self.reasoning_content or self.reasoning or ""


class Choice(msgspec.Struct):
    text: str | None = None  # of completions
    delta: Delta | None = None  # of chats
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    token_precisions: list[tuple[str, int]] | None = None

    @property
    def piece(self) -> str:
        return self.text or (self.delta.text if self.delta is not None else "")


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw | None = None


decode_chunk = msgspec.json.Decoder(Chunk).decode
