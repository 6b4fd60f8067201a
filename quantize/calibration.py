"""Token windows of text to measure a model on."""

import hashlib
import random
from dataclasses import dataclass
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


def calibration_and_evaluation(
    checkpoint: Checkpoint, source: str | None, samples: int, length: int, seed: int
) -> tuple[Windows, Windows]:
    """`samples` windows of `length` tokens to rank layers on, and as many to compare ranks on.

    The first half of the text is for calibration, the second for evaluation; windows are drawn
    from the halves without overlap. `source` is a text file or a folder of them; None takes the
    held-out text in the model's folder. Raises ConfigError where text is missing or too short.
    """
    arch = checkpoint.architecture
    if samples < 1 or not 2 <= length <= arch.max_position:
        raise ConfigError(
            f"{samples} windows of {length} tokens cannot be measured: ask for at least one of "
            f"2 to {arch.max_position} tokens"
        )
    path = _find_text(checkpoint, source)
    tokens = encode(checkpoint, _read_text(path))
    middle = len(tokens) // 2
    halves = ((tokens[:middle], "first half"), (tokens[middle:], "second half"))
    first, second = (
        _draw(half, f"{path.name}, {part}", samples, length, seed) for half, part in halves
    )
    return first, second


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
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
    if not files:
        raise ConfigError(f"{path} holds no text files ({', '.join(_SUFFIXES)})")
    try:
        return "\n\n".join(file.read_text("utf-8") for file in files)
    except OSError as error:
        raise BadFile(f"cannot read {error.filename}: {error.strerror}") from error
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
    return Windows(TextSample(source, sha256, samples, length), rows)
