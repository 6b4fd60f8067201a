"""Fields that OpenAI's and vLLM's clients know and this server does not do."""

from functools import cache
from typing import Any

import msgspec
from msgspec import Struct, field

from morphserve.runtime.server.errors import bad_request


class Unsupported(Struct, kw_only=True):
    """What would change the answer if it were done.

    The default of a field asks for nothing, and so does null; every other value is refused.
    """

    prompt_logprobs: Any = None
    suffix: Any = ""
    length_penalty: Any = 1
    use_beam_search: Any = False
    logits_processors: Any = []
    bad_words: Any = []
    allowed_token_ids: Any = None
    response_format: Any = field(default_factory=lambda: {"type": "text"})
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    truncate_prompt_tokens: Any = None
    prompt_embeds: Any = None
    priority: Any = 0
    tools: Any = []
    tool_choice: Any = "none"
    functions: Any = []
    function_call: Any = "none"
    add_generation_prompt: Any = True
    continue_final_message: Any = False
    chat_template: Any = None
    chat_template_kwargs: Any = {}
    documents: Any = []
    modalities: Any = field(default_factory=lambda: ["text"])
    audio: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = "none"
    verbosity: Any = "medium"

    def refuse_unsupported(self) -> None:
        """Raises ApiError naming the first field that asks for something not done here."""
        for name, neutral in neutral_values(type(self)).items():
            refuse(name, getattr(self, name), neutral)


def refuse(name: str, value: Any, neutral: Any = None) -> None:
    """Raises ApiError naming the field, unless its value asks for nothing."""
    is_neutral = value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
    if value is None or is_neutral:  # 0 is no false here, nor 1 a true
        return
    only = "" if not neutral else f"only {name}={msgspec.json.encode(neutral).decode()}, or "
    raise bad_request(
        f"{name} is not supported by this server: {only}leave it out", name, "unsupported"
    )


@cache
def neutral_values(kind: type[Unsupported]) -> dict[str, Any]:
    """By name; a kind of request may take another default than the one above."""
    defaults = {
        entry.name: entry.default
        if entry.default_factory is msgspec.NODEFAULT
        else entry.default_factory()
        for entry in msgspec.structs.fields(kind)
    }
    return {name: defaults[name] for name in Unsupported.__struct_fields__}
