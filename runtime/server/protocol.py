"""Bodies of requests and responses, with the bounds of every field."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from morphserve.runtime.request import SamplingParams
from morphserve.runtime.server.errors import bad_request
from morphserve.runtime.server.unsupported import Unsupported, refuse

MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_DETOKENIZED = 2**18
DEFAULT_MAX_TOKENS = 16
_MAX_INT32 = 2**31 - 1
_MAX_INT64 = 2**63 - 1
_GREEDY_BELOW = 1e-5  # temperatures under this would overflow the softmax and mean greedy anyway

Count = Annotated[int, Meta(ge=1, le=_MAX_INT32)]
TokenId = Annotated[int, Meta(ge=0, le=_MAX_INT32)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Unsupported, kw_only=True):
    """What completions and chat completions share. null means the default."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_MAX_INT32)] | None = None
    seed: Annotated[int, Meta(ge=-1, le=_MAX_INT64)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=_MAX_INT32)] | None = None
    ignore_eos: bool | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.stream_options is not None and self.stream_options.continuous_usage_stats:
            refuse("stream_options.continuous_usage_stats", True)

    def sampling(self, max_tokens: int) -> SamplingParams:
        temperature = 1.0 if self.temperature is None else self.temperature
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            raise bad_request(
                f"min_tokens ({min_tokens}) is larger than max_tokens ({max_tokens})",
                "min_tokens",
            )
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),  # -1 means all, too
            seed=None if self.seed == -1 else self.seed,  # -1 means any, too
            min_tokens=min_tokens,
            ignore_eos=self.ignore_eos is True,
            stop_token_ids=tuple(self.stop_token_ids or ()),
        )


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: Annotated[int, Meta(ge=0, le=_MAX_INT32)] | None = None
    add_special_tokens: Any = True

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise bad_request("prompt must not be empty", "prompt")
        kinds = {type(part) for part in self.prompt}
        if len(kinds) > 1:
            raise bad_request("prompt must not mix texts, token ids and lists", "prompt")
        if kinds == {int}:
            return [self.prompt]  # type: ignore[list-item]
        if len(self.prompt) > MAX_PROMPTS:
            raise bad_request(
                f"prompt has {len(self.prompt)} entries, at most {MAX_PROMPTS} are taken", "prompt"
            )
        return self.prompt  # type: ignore[return-value]


class ContentPart(Struct):
    type: str
    text: str | None = None


class ChatMessage(Struct):
    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    tool_calls: Any = None
    function_call: Any = None

    def plain(self, path: str) -> dict[str, str]:
        """As chat templates want it: role and text. `path` names the message in errors."""
        refuse(f"{path}.tool_calls", self.tool_calls, [])
        refuse(f"{path}.function_call", self.function_call)
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        parts = self.content or []
        if any(part.type != "text" or part.text is None for part in parts):
            raise bad_request(f"{path}.content may hold text parts only", f"{path}.content")
        return {"role": self.role, "content": "".join(part.text or "" for part in parts)}


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """As chat templates want them. Raises ApiError for what is not text."""
    return [message.plain(f"messages[{i}]") for i, message in enumerate(messages)]


class ChatRequest(SamplingFields, kw_only=True):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    add_special_tokens: Any = False

    @property
    def token_limit(self) -> int | None:
        """The newer name wins; None: as many as fit."""
        return self.max_completion_tokens or self.max_tokens


class TokenizeRequest(Struct):
    """Either a prompt or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True  # of a prompt; a chat's are in its template


class Tokens(Struct):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: None = None


class DetokenizeRequest(Struct):
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_DETOKENIZED)]
    model: str | None = None


class DetokenizeReply(Struct):
    prompt: str


class MorphUsage(Struct):
    """Completion tokens by the lowest precision that a layer had in the step that made them."""

    full: int = 0
    int8: int = 0
    int4: int = 0


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    morph: MorphUsage


class CompletionChoice(Struct):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: None = None


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
    logprobs: None = None


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class AssistantMessage(Struct):
    content: str
    role: Literal["assistant"] = "assistant"


class ChatChoice(Struct):
    index: int
    message: AssistantMessage
    finish_reason: str | None
    logprobs: None = None


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


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
