"""Prompts: real text that tokenises to exactly as many tokens as a trace asks for."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from morphserve.configs.errors import MorphError

_ATTEMPTS = 16  # windows tried before token ids are sent instead of text


class PromptError(MorphError):
    """No prompts can be made; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """One prompt per request: text, or token ids where no text of that length was found."""

    prompts: tuple[str | list[int], ...]
    warm_up: str | list[int]  # as long as the shortest
    tokenizer: Tokenizer | None = None  # that made them; None: all are text

    @property
    def num_token_ids(self) -> int:
        """Prompts that are sent as token ids."""
        return sum(not isinstance(prompt, str) for prompt in self.prompts)

    def as_text(self, prompt: str | list[int]) -> str:
        """One of these, for a server that takes no ids; its length may change a little by this."""
        if isinstance(prompt, str):
            return prompt
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(prompt))


def load_corpus(model: Path, prompts_file: Path | None) -> str:
    """The text that prompts are cut from: the given file, or the model folder's held-out text."""
    path = prompts_file or model / "held_out.txt"
    if prompts_file is None and not path.exists():
        raise PromptError(f"{model} has no held_out.txt to cut prompts from: give --prompts FILE")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read prompts from {path}: {error}") from error


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder."""
    path = model / "tokenizer.json"
    if not path.is_file():
        raise PromptError(f"{model} has no tokenizer.json, which prompts of exact length need")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise PromptError(f"{path} cannot be read as a tokenizer: {error}") from error


def make_prompts(tokenizer: Tokenizer, text: str, lengths: Sequence[int], seed: int) -> Prompts:
    """Prompts of exactly `lengths` tokens, special tokens included, each from another place.

    Raises PromptError if the text is shorter than the longest prompt.
    """
    corpus: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    special = len(tokenizer.encode("", add_special_tokens=True).ids)
    longest = max(lengths)
    if len(corpus) <= longest:
        raise PromptError(
            f"the text for prompts has {len(corpus):,} tokens, the longest prompt needs "
            f"{longest:,}: give a longer --prompts FILE, or lower --max-prompt"
        )
    rng = random.Random(seed)
    prompts = tuple(_prompt(tokenizer, corpus, n, special, rng) for n in lengths)
    warm_up = _prompt(tokenizer, corpus, min(lengths), special, rng)
    return Prompts(prompts, warm_up, tokenizer)


def _prompt(
    tokenizer: Tokenizer, corpus: list[int], length: int, special: int, rng: random.Random
) -> str | list[int]:
    width = max(1, length - special)
    for _ in range(_ATTEMPTS):
        start = rng.randrange(len(corpus) - width)
        if prompt := _exact_text(tokenizer, corpus[start : start + width + 8], length, width):
            return prompt
    return corpus[start : start + length]


def _exact_text(tokenizer: Tokenizer, window: list[int], length: int, width: int) -> str | None:
    """Text from the front of `window` that encodes to `length` tokens, or None.

    Token boundaries at the cut may merge or split, so nearby widths are tried: a cut inside a word
    or a character rarely survives the way through text.
    """
    for size in dict.fromkeys((width, width - 1, width + 1, width - 2, width + 2, width + 4)):
        if 0 < size <= len(window):
            text = tokenizer.decode(window[:size], skip_special_tokens=False)
            if len(tokenizer.encode(text).ids) == length:
                return text
    return None
