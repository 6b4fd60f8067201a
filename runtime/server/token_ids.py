"""Ids of tokens beside their text, and the precision at which each was made."""

from dataclasses import dataclass

from morphserve.quantize.manifest import Variant
from morphserve.runtime.deliveries import Chunk


@dataclass(slots=True)
class TokenIds:
    """Of a piece of one choice, whether or not the tokens have a text in it."""

    ids: list[int]
    precisions: list[tuple[Variant, int]]  # runs of `ids` that were made alike, in their order
    prompt: list[int] | None = None  # in the first piece of a choice

    def add(self, more: "TokenIds") -> None:
        """Appends the tokens of the next piece."""
        self.ids += more.ids
        for precision, count in more.precisions:
            if self.precisions and self.precisions[-1][0] is precision:
                count += self.precisions.pop()[1]
            self.precisions.append((precision, count))


def token_ids(chunk: Chunk, prompt: list[int] | None) -> TokenIds:
    """Those of a chunk; `prompt` if it is the first one."""
    count = len(chunk.tokens)
    return TokenIds(list(chunk.tokens), [(chunk.precision, count)] if count else [], prompt)
