"""Text becomes token windows, apart for calibration and evaluation."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from morphserve.configs.errors import MorphError
from morphserve.quantize.calibration import calibration_and_evaluation, encode
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


def test_calibration_and_evaluation_share_no_text(checkpoint: Checkpoint, text: Path) -> None:
    calibration, evaluation = calibration_and_evaluation(checkpoint, str(text), 5, 64, seed=0)
    (a,), (b,) = encode(checkpoint, "a"), encode(checkpoint, "b")
    assert torch.equal(calibration.tokens, torch.full((5, 64), a))
    assert torch.equal(evaluation.tokens, torch.full((5, 64), b))
    assert calibration.sample.source == "text.txt, first half"
    assert (evaluation.sample.num_windows, evaluation.sample.window_tokens) == (5, 64)
    assert calibration.sample.sha256 != evaluation.sample.sha256


def test_the_seed_decides_the_windows(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(32, 127))) * 40)
    first, again, other = (
        calibration_and_evaluation(checkpoint, str(path), 3, 50, seed)[0] for seed in (1, 1, 2)
    )
    assert first.sample == again.sample
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_a_folder_is_read_file_by_file(checkpoint: Checkpoint, text: Path) -> None:
    shutil.copy(text, text.parent / "more.md")
    (text.parent / "image.png").write_bytes(b"\xff\xd8")
    calibration, _ = calibration_and_evaluation(checkpoint, str(text.parent), 12, 64, seed=0)
    assert len(calibration.tokens) == 12


def test_the_shipped_model_brings_its_text() -> None:
    calibration, evaluation = calibration_and_evaluation(open_checkpoint("demo"), None, 2, 128, 0)
    assert calibration.tokens.shape == evaluation.tokens.shape == (2, 128)


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
        calibration_and_evaluation(checkpoint, str(text), samples, length, 0)


def test_text_that_cannot_be_read_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xfa")
    for source, reason in (
        (None, "pass --calibration"),
        (str(tmp_path / "none.txt"), "cannot read"),
        (str(binary), "not UTF-8"),
        (str(tmp_path), "holds no text files"),
    ):
        with pytest.raises(MorphError, match=reason):
            calibration_and_evaluation(checkpoint, source, 1, 16, 0)


def test_a_model_without_tokenizer_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint.path, tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(MorphError, match="tokenizer.json cannot be read"):
        encode(open_checkpoint(str(model)), "text")
    (model / "tokenizer.json").unlink()
    with pytest.raises(MorphError, match="lacks tokenizer.json"):
        encode(open_checkpoint(str(model)), "text")
