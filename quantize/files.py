"""Files of tensors: strict safetensors reading into owned memory, and atomic writing."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Self

import safetensors.torch
import torch
from torch import Tensor

from morphserve.configs.errors import MorphError

_MAX_HEADER_BYTES = 100_000_000
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DTYPES = {  # in the order in which `encode_tensors` lays them out
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class BadFile(MorphError):
    """A file of the model or the bundle is missing, damaged or not what it should be."""

    exit_code = 3


class DiskFull(BadFile):
    """There is no room for a file, or it may not become as large."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in its file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    num_bytes: int


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors a safetensors file holds. Raises BadFile unless header and size agree."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = _header_bytes(path, file.read(8), file_bytes)
            header = file.read(header_bytes)
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror}") from error
    return _checked_entries(path, header, file_bytes)


def parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors in a whole safetensors file that was read from `path`, in memory of their own."""
    header_bytes = _header_bytes(path, data[:8], len(data))
    entries = _checked_entries(path, data[8 : 8 + header_bytes], len(data))
    return {name: _copy(entry, data) for name, entry in entries.items()}


def _copy(entry: TensorEntry, data: bytes) -> Tensor:
    if not entry.num_bytes:  # `frombuffer` takes no empty buffer
        return torch.empty(entry.shape, dtype=entry.dtype)
    piece = bytearray(data[entry.start : entry.start + entry.num_bytes])
    return torch.frombuffer(piece, dtype=entry.dtype).view(entry.shape)


def _header_bytes(path: Path, length: bytes, file_bytes: int) -> int:
    header_bytes = int.from_bytes(length, "little")
    if file_bytes < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise BadFile(f"{path} is not a whole safetensors file: copy or download it again")
    return header_bytes


def _checked_entries(path: Path, header: bytes, file_bytes: int) -> dict[str, TensorEntry]:
    entries = _parse_header(path, header, 8 + len(header))
    _check_layout(path, entries, 8 + len(header), file_bytes)
    return entries


def _parse_header(path: Path, header: bytes, data_start: int) -> dict[str, TensorEntry]:
    try:
        table = json.loads(header, object_pairs_hook=_unique)
        table.pop("__metadata__", None)
        return {name: _entry(path, fact, data_start) for name, fact in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadFile(f"{path} has a malformed safetensors header ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is listed twice")
    return table


def _entry(path: Path, fact: dict[str, Any], data_start: int) -> TensorEntry:
    dtype = _DTYPES[fact["dtype"]]
    shape = tuple(fact["shape"])
    start, end = fact["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError("sizes must be whole numbers")
    if end - start != prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's size does not match its shape")
    return TensorEntry(path, dtype, shape, data_start + start, end - start)


def _check_layout(
    path: Path, entries: Mapping[str, TensorEntry], data_start: int, file_bytes: int
) -> None:
    """Tensors must follow each other without hole or overlap up to the end of the file."""
    expected = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.num_bytes)):
        if entry.start != expected:
            raise BadFile(f"{path} has tensors that overlap or leave a hole")
        expected += entry.num_bytes
    if expected != file_bytes:
        kind = "truncated" if file_bytes < expected else "longer than its header says"
        raise BadFile(
            f"{path} is {kind} ({file_bytes} bytes instead of {expected}): "
            "copy or download it again"
        )


def read_tensor(entry: TensorEntry) -> Tensor:
    """The tensor in memory of its own (a file that changes later cannot touch it)."""
    data = torch.empty(entry.num_bytes, dtype=torch.uint8)
    try:
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(data.numpy().data) != entry.num_bytes:
                raise BadFile(f"{entry.path} became shorter while it was read")
    except OSError as error:
        raise BadFile(f"cannot read {entry.path}: {error.strerror}") from error
    return data.view(entry.dtype).view(entry.shape)


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The safetensors file that holds these tensors."""
    return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})


def file_bytes(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Size of the file that `encode_tensors` makes of tensors of these dtypes and shapes."""
    places = list(_NAMES)
    tensors = sorted(layout.items(), key=lambda item: (places.index(item[1][0]), item[0]))
    header, end = {}, 0
    for name, (dtype, shape) in tensors:
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    header_bytes = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-header_bytes // 8) * 8 + end


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `path` so that it holds all of `data` or what it held before, even after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kind = DiskFull if error.errno in _NO_ROOM else BadFile
        raise kind(f"cannot write {path}: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    """Makes the names of the files in a folder as lasting as what they hold."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str | None:
    """sha256 of a file's content; None if there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


class Lock:
    """A file that one process holds at a time; one that dies lets go."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """None if another process holds it."""
        while True:
            file = path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return None
            if _is_open_at(path, file):
                return cls(path, file)
            file.close()  # its last holder removed it between our opening and our locking it

    def release(self) -> None:
        """Removes the file."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


def _is_open_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
