"""Bodies of responses."""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from morphserve.quantize.manifest import Variant


class MorphUsage(Struct):
    """Completion tokens by the lowest precision that a layer had in the step that made them."""

    full: int = 0
    int8: int = 0
    int4: int = 0
    queue_s: Annotated[
        float, Meta(description="Seconds until first scheduled, of the choice that waited longest.")
    ] = 0.0


class PromptTokensDetails(Struct):
    cached_tokens: int  # whose KV was there from an earlier request


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    morph: MorphUsage


class CompletionLogprobs(Struct):
    """One entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]  # the chosen token's own is always among them
    text_offset: list[int]  # characters of the choice's text before the token


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str  # a part of a character reads as U+FFFD; `bytes` tell
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


_IDS = "With return_token_ids: "
PromptIds = (
    Annotated[list[int], Meta(description=_IDS + "of the prompt; in a stream, in the first chunk.")]
    | UnsetType
)
OutputIds = (
    Annotated[
        list[int],
        Meta(
            description=_IDS + "of the output, all that completion_tokens counts; in a stream, "
            "those since the chunk before."
        ),
    ]
    | UnsetType
)
Precisions = (
    Annotated[
        list[tuple[Variant, int]],
        Meta(
            description=_IDS + "how token_ids were made, in their order, as runs: the lowest "
            "precision that a layer had in a step, and how many tokens were made so."
        ),
    ]
    | UnsetType
)


class CompletionChoice(Struct):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    prompt_token_ids: PromptIds = UNSET
    token_ids: OutputIds = UNSET
    token_precisions: Precisions = UNSET


class Completion(Struct, omit_defaults=False):
    """A whole completion, or one chunk of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    object: Literal["text_completion"] = "text_completion"


class ChatDelta(Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: OutputIds = UNSET
    token_precisions: Precisions = UNSET


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    prompt_token_ids: PromptIds = UNSET


class AssistantMessage(Struct):
    content: str
    role: Literal["assistant"] = "assistant"


class ChatChoice(Struct):
    index: int
    message: AssistantMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    token_ids: OutputIds = UNSET
    token_precisions: Precisions = UNSET


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_token_ids: PromptIds = UNSET


class Tokens(Struct):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: None = None


class DetokenizeReply(Struct):
    prompt: str


class Model(Struct):
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "morphserve"


class ModelList(Struct):
    data: list[Model] = field(default_factory=list)
    object: Literal["list"] = "list"


encode = msgspec.json.Encoder().encode
