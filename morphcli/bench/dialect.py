"""The forms of a request that OpenAI-compatible servers take: they differ in route and fields."""

from collections.abc import Iterator

import msgspec


class Dialect(msgspec.Struct, frozen=True):
    """One form; the default is the whole of what a benchmark wants."""

    is_chat: bool = False  # the prompt is one message of a user
    forces_length: bool = True  # ignore_eos and min_tokens are sent
    asks_usage: bool = True  # stream_options is sent
    takes_ids: bool = True  # prompts may be token ids

    @property
    def route(self) -> str:
        """Path of the endpoint."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def fields(self, prompt: str | list[int], num_tokens: int, *, exact: bool) -> dict[str, object]:
        """Of a streamed answer of `num_tokens` tokens, or of at most so many if not `exact`."""
        fields: dict[str, object] = {"max_tokens": num_tokens, "temperature": 0, "stream": True}
        if self.is_chat:
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            fields["prompt"] = prompt
        if self.asks_usage:
            fields["stream_options"] = {"include_usage": True}
        if self.forces_length and exact:
            fields |= {"min_tokens": num_tokens, "ignore_eos": True}
        return fields


def dialects() -> Iterator[Dialect]:
    """In the order in which they are tried: what tells more comes first."""
    for is_chat in (False, True):
        yield Dialect(is_chat)
        yield Dialect(is_chat, forces_length=False)
        yield Dialect(is_chat, forces_length=False, asks_usage=False)
