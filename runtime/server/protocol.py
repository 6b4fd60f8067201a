"""Bodies of requests, with the bounds of every field; what they say about sampling is next door."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from morphserve.runtime.server.errors import bad_request
from morphserve.runtime.server.sampling import Count, SamplingFields, TokenId
from morphserve.runtime.server.unsupported import refuse

MAX_CHOICES = 64  # of one request: prompts times n
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_DETOKENIZED = 2**18
DEFAULT_MAX_TOKENS = 16

NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None  # to the prompt, unless it is token ids; null: yes

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
        if len(self.prompt) > MAX_CHOICES:
            raise bad_request(
                f"prompt has {len(self.prompt)} entries, at most {MAX_CHOICES} are taken", "prompt"
            )
        if len(self.prompt) * self.num_choices > MAX_CHOICES:
            raise bad_request(
                f"{len(self.prompt)} prompts with n={self.num_choices} choices each are more than "
                f"the {MAX_CHOICES} choices that are taken",
                "n",
            )
        return self.prompt  # type: ignore[return-value]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.echo and self.logprobs is not None:
            raise bad_request(
                "echo with logprobs is not supported by this server: leave one of them out",
                "echo",
                "unsupported",
            )


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
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    echo: Any = False
    add_special_tokens: Any = False

    @property
    def token_limit(self) -> int | None:
        """The newer name wins; None: as many as fit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        refuse("echo", self.echo, False)
        refuse("add_special_tokens", self.add_special_tokens, False)
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")


class TokenizeRequest(Struct):
    """Either a prompt or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True  # of a prompt; a chat's are in its template


class DetokenizeRequest(Struct):
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_DETOKENIZED)]
    model: str | None = None
