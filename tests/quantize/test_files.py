"""Files of tensors are read strictly and written whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from morphserve.quantize.files import (
    BadFile,
    Lock,
    encode_tensors,
    file_bytes,
    parse_tensors,
    read_entries,
    read_tensor,
    write_atomically,
)


def a_file(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path


def fact(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> Any:
    return {"dtype": dtype, "shape": shape or [end - start], "data_offsets": [start, end]}


def test_tensors_come_back_in_memory_of_their_own(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(4)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_tensors(tensors))
    read = {name: read_tensor(entry) for name, entry in read_entries(path).items()}
    path.write_bytes(b"")
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)


def test_parsing_a_files_content_equals_reading_it(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5).half(), "b": torch.arange(4, dtype=torch.int32)}
    parsed = parse_tensors(tmp_path / "x", encode_tensors(tensors))
    assert parsed.keys() == tensors.keys()
    assert all(torch.equal(parsed[name], tensors[name]) for name in tensors)


def test_tensors_without_values_are_read_too(tmp_path: Path) -> None:
    data = encode_tensors({"a": torch.zeros(0, 3), "b": torch.zeros(2)})
    (tmp_path / "x").write_bytes(data)
    entries = read_entries(tmp_path / "x")
    for found in (parse_tensors(tmp_path / "x", data)["a"], read_tensor(entries["a"])):
        assert (found.shape, found.dtype) == ((0, 3), torch.float32)


def test_a_files_size_is_known_before_it_is_made() -> None:
    dtypes = (torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.half, torch.uint8)
    tensors = {
        f"{'x' * i}{dtype}": torch.zeros(i + 1, 37).to(dtype) for i in range(3) for dtype in dtypes
    }
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert file_bytes(layout) == len(encode_tensors(tensors))


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for _ in range(2):
        lock = Lock.take(path)
        assert lock is not None and Lock.take(path) is None
        lock.release()
        lock.release()
        assert not path.exists()


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (json.dumps({"a": fact(0, 4)}), b"123", "truncated"),
        (json.dumps({"a": fact(0, 4)}), b"12345", "longer"),
        (json.dumps({"a": fact(0, 4), "b": fact(2, 6)}), b"123456", "overlap"),
        (json.dumps({"a": fact(0, 2), "b": fact(4, 6)}), b"123456", "hole"),
        (json.dumps({"a": fact(0, 4, [5])}), b"1234", "does not match its shape"),
        (json.dumps({"a": fact(0, 4, [-1])}), b"1234", "whole numbers"),
        (json.dumps({"a": fact(0, 4, dtype="F9")}), b"1234", "F9"),
        (f'{{"a": {json.dumps(fact(0, 2))}, "a": {json.dumps(fact(2, 4))}}}', b"1234", "twice"),
        ("[]", b"", "malformed"),
        ("{" * 5000, b"", "malformed"),
        ("[" * 100_000, b"", "malformed"),
        ('{"a": 1}', b"", "malformed"),
    ],
)
def test_a_malformed_file_is_refused_by_name(
    tmp_path: Path, header: str, data: bytes, reason: str
) -> None:
    path = a_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(BadFile, match=reason) as caught:
        read_entries(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234", (2**62).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadFile, match="not a whole safetensors file"):
        read_entries(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(BadFile, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
