"""Token windows of text to measure a model on."""

import hashlib
import random
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from morphserve.configs.errors import ConfigError
from morphserve.quantize.checkpoint import BadCheckpoint, Checkpoint
from morphserve.quantize.files import BadFile
from morphserve.quantize.manifest import TextSample

_SHIPPED_TEXT = "held_out.txt"  # text a model folder may bring that it was not trained on
_SUFFIXES = (".txt", ".md", ".py")


@dataclass(frozen=True, slots=True)
class Windows:
    sample: TextSample
    tokens: Tensor  # [num_windows, window_tokens] int64


class Part(Enum):
    """Parts of a text that share nothing, as shares of its tokens: no result flatters itself."""

    CALIBRATION = "first half", 0.0, 0.5  # weights are rounded and layers scored on it
    SELECTION = "third quarter", 0.5, 0.75  # orders are compared on it
    EVALUATION = "last quarter", 0.75, 1.0  # what is reported as quality

    def of(self, tokens: list[int]) -> list[int]:
        _, start, end = self.value
        return tokens[int(start * len(tokens)) : int(end * len(tokens))]


def draw_windows(
    checkpoint: Checkpoint, source: str | None, part: Part, samples: int, length: int, seed: int = 0
) -> Windows:
    """`samples` windows of `length` tokens of a part of a text, chosen by `seed`, none twice.

    `source` is a text file or a folder of them; None takes the held-out text in the model's
    folder. Raises ConfigError where text is missing or too short.
    """
    arch = checkpoint.architecture
    if samples < 1 or not 2 <= length <= arch.max_position:
        raise ConfigError(
            f"{samples} windows of {length} tokens cannot be measured: ask for at least one of "
            f"2 to {arch.max_position} tokens"
        )
    path = _find_text(checkpoint, source)
    tokens = encode(checkpoint, _read_text(path))
    return _draw(part.of(tokens), f"{path.name}, {part.value[0]}", samples, length, seed)


def encode(checkpoint: Checkpoint, text: str) -> list[int]:
    """Token ids of `text` by the checkpoint's own tokenizer, without special tokens."""
    file = checkpoint.path / "tokenizer.json"
    if not file.is_file():
        raise BadCheckpoint(f"{checkpoint.path} lacks tokenizer.json: copy it from the original")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise BadCheckpoint(f"{file} cannot be read: {error}") from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if ids and max(ids) >= checkpoint.architecture.vocab_size:
        raise BadCheckpoint(f"{file} makes token ids beyond the model's vocabulary")
    return ids


def _find_text(checkpoint: Checkpoint, source: str | None) -> Path:
    if source == "":
        raise ConfigError("--calibration is empty: give a text file or a folder of them")
    if source is not None:
        return Path(source).expanduser()
    shipped = checkpoint.path / _SHIPPED_TEXT
    if not shipped.is_file():
        raise ConfigError(
            f"{checkpoint.path} brings no text to measure on: pass --calibration with a text file "
            "or a folder of them, of the kind of text that will be served"
        )
    return shipped


def _read_text(path: Path) -> str:
    try:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        texts = [_read_file(file) for file in files]
    except OSError as error:
        raise BadFile(f"cannot read {error.filename}: {error.strerror}") from error
    if not texts:
        raise ConfigError(f"{path} holds no text files ({', '.join(_SUFFIXES)})")
    return "\n\n".join(texts)


def _read_file(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not UTF-8 text: {error}") from error


def _draw(tokens: list[int], source: str, samples: int, length: int, seed: int) -> Windows:
    available = len(tokens) // length
    if available < samples:
        raise ConfigError(
            f"{source} holds {available} windows of {length} tokens, {samples} are asked for: "
            "give more text, or fewer or shorter windows"
        )
    places = sorted(random.Random(seed).sample(range(available), samples))
    rows = torch.tensor([tokens[place * length : (place + 1) * length] for place in places])
    sha256 = hashlib.sha256(rows.numpy().data).hexdigest()
    return Windows(TextSample(source, sha256, samples, length, seed), rows)
