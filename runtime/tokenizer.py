"""Text to token ids and back, with the tokenizer files of a checkpoint; needs no torch."""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from morphserve.configs.errors import MorphError, UnsupportedModel

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")  # of SentencePiece vocabularies, as is:
_SPACE = "\u2581"
_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 5  # of the prompt; enough to hold the bytes of a whole character


class PromptTooLong(MorphError):
    """The text cannot fit, whatever its tokens turn out to be."""


class TemplateError(MorphError):
    """The chat template does not take these messages."""


class Detokenizer(Protocol):
    """Text of one request, piece by piece; the pieces together are the whole text."""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; a character that is not whole yet is held back."""
        ...

    def finish(self) -> str:
        """What is still held back."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies: each token is a run of UTF-8 bytes."""

    def __init__(self, tokenizer: "Tokenizer", special_tokens: bool) -> None:
        self._token_bytes = partial(tokenizer.token_bytes, special_tokens=special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(map(self._token_bytes, tokens)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For any vocabulary: decodes the tokens since the last whole character, with those before.

    The tokens before matter because some decoders treat the first token of a text differently:
    `context` holds the prompt's last ones.
    """

    def __init__(
        self, tokenizer: "Tokenizer", context: Sequence[int], special_tokens: bool
    ) -> None:
        self._decode = partial(tokenizer.decode, special_tokens=special_tokens)
        self._tokens = list(context)
        self._num_context = len(context)  # leading tokens whose text is known to the client

    def add(self, tokens: Sequence[int]) -> str:
        self._tokens += tokens
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        del self._tokens[: self._num_context]
        self._num_context = len(self._tokens)
        return text

    def finish(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        known = self._decode(self._tokens[: self._num_context])
        return self._decode(self._tokens)[len(known) :]


class Tokenizer:
    """One checkpoint's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _load(folder)
        config = _read_config(folder)
        self._named = {name: _token_text(config.get(name)) for name in _NAMED_TOKENS}
        self._template = _compile_template(folder, config)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special = {token for token, entry in added.items() if entry.special}
        vocab = self._tokenizer.get_vocab()
        self._longest = max(map(len, vocab), default=1)
        self.num_ids = 1 + max(vocab.values(), default=-1)  # ids are below this
        decoder = json.loads(self._tokenizer.to_str())["decoder"]
        self._is_byte_level = decoder is not None and decoder["type"] == "ByteLevel"

    def encode(self, text: str, max_tokens: int, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises PromptTooLong, before doing the work, for a text with more than `max_tokens` tokens
        even if each were the longest of the vocabulary.
        """
        if len(text) > max_tokens * self._longest:
            least = -(-len(text) // self._longest)
            raise PromptTooLong(
                f"the prompt has at least {least} tokens, this server takes at most {max_tokens}"
            )
        # As a batch of one: unlike encode, this lets other threads run meanwhile.
        return self._tokenizer.encode_batch([text], add_special_tokens=special_tokens)[0].ids

    def decode(self, tokens: Sequence[int], *, special_tokens: bool = False) -> str:
        """The text of these tokens; special ones are left out unless wanted."""
        return self._tokenizer.decode(tokens, skip_special_tokens=not special_tokens)

    def token_bytes(self, token: int, *, special_tokens: bool = False) -> bytes:
        """UTF-8 bytes of a token; none for an unknown one, or a special one that is not wanted."""
        text = self._tokenizer.id_to_token(token)
        if text is None or token in self._special and not special_tokens:
            return b""
        if token in self._added:
            return text.encode()  # stored as it reads
        if not self._is_byte_level:
            byte = _BYTE_TOKEN.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()
        try:
            return bytes(_BYTE_OF[char] for char in text)
        except KeyError:
            return text.encode()

    def detokenizer(self, prompt: Sequence[int], *, special_tokens: bool = False) -> Detokenizer:
        """A fresh one, for what follows this prompt."""
        if self._is_byte_level:
            return ByteDetokenizer(self, special_tokens)
        return WindowDetokenizer(self, prompt[-_CONTEXT_TOKENS:], special_tokens)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins to speak.

        Without a chat template in the checkpoint, each message becomes a line `role: content`, and
        the last line is `assistant:`. Raises TemplateError if the template refuses the messages.
        """
        if self._template is None:
            lines = [f"{message['role']}: {message['content']}\n" for message in messages]
            return self.encode("".join(lines) + "assistant:", max_tokens)
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, **self._named
            )
        except Exception as error:  # foreign code: it may raise anything
            raise TemplateError(f"the model's chat template refuses this: {error}") from error
        return self.encode(text, max_tokens, special_tokens=False)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _load(folder: Path) -> tokenizers.Tokenizer:
    if not folder.is_dir():
        raise UnsupportedModel(
            f"there is no model folder {folder}: give a Hugging Face folder, or `demo` for the "
            "shipped model"
        )
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedModel(
            f"{folder} has no tokenizer.json: save its fast tokenizer there with "
            "transformers' AutoTokenizer.save_pretrained"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UnsupportedModel(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{path} must hold a JSON object")
    return config


def _token_text(token: Any) -> str | None:
    """A named token is a string, or an object with its `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _compile_template(folder: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
    path = folder / "chat_template.jinja"
    source = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = [entry for entry in source if isinstance(entry, dict)]
        source = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if source is None:
        return None
    if not isinstance(source, str):
        raise UnsupportedModel(
            f"chat_template in {folder / 'tokenizer_config.json'} must be a text, or a list of "
            "names and templates; mend or remove it"
        )
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise UnsupportedModel(
            f"the chat template in {folder} does not compile: {error}; mend or remove it"
        ) from error


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; serving renders its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates expect: Hugging Face's block trimming, filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
