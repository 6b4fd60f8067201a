"""Compiling, caching and the stated fallback."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from morphserve.runtime.kernels import load_kernels, native
from morphserve.runtime.kernels.cpu import CpuKernels
from morphserve.runtime.kernels.native import NativeUnavailable, build, load_library

STATM = Path("/proc/self/statm")  # sizes in pages, the second is what is resident


@pytest.fixture(autouse=True)
def quick_compiler(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_without_a_compiler_torch_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        kernels = load_kernels("cpu")
    assert kernels.name == "torch"
    assert "no C compiler" in caplog.text and "torch runs instead" in caplog.text


def test_a_failing_compiler_is_named_with_its_first_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    with pytest.raises(NativeUnavailable, match="cc failed: no such luck"):
        build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def homeless(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    patch.delenv("XDG_CACHE_HOME", raising=False)
    patch.setattr(Path, "home", fail)


def unwritable(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    patch.setenv("XDG_CACHE_HOME", str(folder / "file"))


def unloadable(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A file system from which nothing is run."""
    cache, load = folder / "noexec", ctypes.CDLL

    def refuse(name: str, *options: Any) -> ctypes.CDLL:
        if name.startswith(str(cache)):
            raise OSError("failed to map segment from shared object")
        return load(name, *options)

    patch.setenv("XDG_CACHE_HOME", str(cache))
    patch.setattr(ctypes, "CDLL", refuse)


@pytest.mark.parametrize("spoil", [homeless, unwritable, unloadable])
def test_without_a_cache_the_kernels_are_compiled_in_a_folder_that_goes_again(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(tmp_path, monkeypatch)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with caplog.at_level(logging.WARNING):
        assert load_library().morph_linear
    assert "compiled at every start: set XDG_CACHE_HOME" in caplog.text
    assert list(scratch.iterdir()) == []


def test_a_library_that_was_cut_off_is_built_again_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = build(native.cache_folder())
    whole = library.stat().st_size
    library.write_bytes(b"\x7fELF")
    with caplog.at_level(logging.WARNING):
        assert load_library().morph_linear
    assert caplog.text == ""
    assert library.stat().st_size == whole


def test_what_nobody_loads_any_more_leaves_the_cache(tmp_path: Path) -> None:
    kept, unused, scratch = (tmp_path / n for n in ("kernels-a.so", "kernels-b.so", "build-c"))
    kept.touch()
    unused.touch()
    scratch.mkdir()
    long_ago = time.time() - native.KEPT_S - 60
    for path in (unused, scratch):
        os.utime(path, (long_ago, long_ago))
    library = build(tmp_path)
    assert set(tmp_path.iterdir()) == {kept, library}
    os.utime(library, (long_ago, long_ago))
    assert build(tmp_path).stat().st_mtime > long_ago + 60


def test_two_processes_may_compile_at_once_and_the_next_finds_the_library(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from morphserve.runtime.kernels import native; "
        "native.FLAGS += ('-O0',); print(native.build(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1]
    library = Path(printed[0])
    assert list(tmp_path.iterdir()) == [library]
    built = library.stat().st_ino
    assert build(tmp_path) == library
    assert library.stat().st_ino == built


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATM.exists(), reason="this system tells it otherwise")
def test_threads_that_end_leave_no_memory_behind() -> None:
    kernels = CpuKernels()
    x, weight = torch.randn(600, 4096), kernels.pack_full(torch.randn(1, 4096))
    scratch_bytes = x.nbytes  # what the product keeps in each thread, and half as much again

    def multiply() -> None:
        thread = threading.Thread(target=kernels.linear, args=(x, weight))
        thread.start()
        thread.join()

    multiply()
    before = resident_bytes()
    for _ in range(20):
        multiply()
    assert resident_bytes() - before < 5 * scratch_bytes
