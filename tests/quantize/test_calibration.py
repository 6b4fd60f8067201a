"""Text becomes token windows of parts that share nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from morphserve.configs.errors import MorphError
from morphserve.quantize.calibration import Part, draw_windows, encode
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(str(tiny_model("llama")))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """400 tokens of `a`, then 400 of `b`."""
    path = tmp_path / "text.txt"
    path.write_text("a" * 400 + "b" * 400)
    return path


def test_parts_share_no_text(checkpoint: Checkpoint, text: Path) -> None:
    parts = {part: draw_windows(checkpoint, str(text), part, 3, 64) for part in Part}
    (a,), (b,) = encode(checkpoint, "a"), encode(checkpoint, "b")
    assert torch.equal(parts[Part.CALIBRATION].tokens, torch.full((3, 64), a))
    assert torch.equal(parts[Part.SELECTION].tokens, torch.full((3, 64), b))
    sample = parts[Part.EVALUATION].sample
    assert sample.source == "text.txt, last quarter"
    assert (sample.num_windows, sample.window_tokens, sample.seed) == (3, 64, 0)
    tokens = list(range(103))
    assert [token for part in Part for token in part.of(tokens)] == tokens


def test_the_seed_decides_the_windows(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(32, 127))) * 40)
    first, again, other = (
        draw_windows(checkpoint, str(path), Part.CALIBRATION, 3, 50, seed) for seed in (1, 1, 2)
    )
    assert first.sample == again.sample
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_a_folder_is_read_file_by_file(checkpoint: Checkpoint, text: Path) -> None:
    shutil.copy(text, text.parent / "more.md")
    (text.parent / "image.png").write_bytes(b"\xff\xd8")
    calibration = draw_windows(checkpoint, str(text.parent), Part.CALIBRATION, 12, 64)
    assert len(calibration.tokens) == 12


def test_the_shipped_model_brings_its_text() -> None:
    for part in Part:
        assert draw_windows(open_checkpoint("demo"), None, part, 2, 128).tokens.shape == (2, 128)


@pytest.mark.parametrize(
    ("samples", "length", "reason"),
    [
        (7, 64, "first half holds 6 windows of 64 tokens, 7 are asked for"),
        (0, 64, "cannot be measured"),
        (1, 257, "2 to 256 tokens"),
    ],
)
def test_windows_that_cannot_be_had_are_refused(
    checkpoint: Checkpoint, text: Path, samples: int, length: int, reason: str
) -> None:
    with pytest.raises(MorphError, match=reason):
        draw_windows(checkpoint, str(text), Part.CALIBRATION, samples, length)


def test_text_that_cannot_be_read_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xfa")
    mixed = tmp_path / "mixed"
    empty = tmp_path / "empty"
    empty.mkdir()
    mixed.mkdir()
    (mixed / "a.txt").write_text("text")
    (mixed / "b.txt").write_bytes(b"\xff\xfe\xfa")
    for source, reason in (
        (None, "pass --calibration"),
        (str(tmp_path / "none.txt"), "cannot read"),
        (str(binary), "not UTF-8"),
        (str(mixed), r"b\.txt is not UTF-8"),
        (str(empty), "holds no text files"),
        ("", "--calibration is empty"),
        ("a" * 300, "cannot read"),
    ):
        with pytest.raises(MorphError, match=reason):
            draw_windows(checkpoint, source, Part.CALIBRATION, 1, 16)


def test_a_model_without_tokenizer_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint.path, tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(MorphError, match="tokenizer.json cannot be read"):
        encode(open_checkpoint(str(model)), "text")
    (model / "tokenizer.json").unlink()
    with pytest.raises(MorphError, match="lacks tokenizer.json"):
        encode(open_checkpoint(str(model)), "text")
