"""Compiling, caching and the stated fallback."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from morphserve.runtime.kernels import load_kernels
from morphserve.runtime.kernels.native import NativeUnavailable, build, load_library


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


def test_a_cache_that_cannot_be_written_means_the_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NativeUnavailable):
        load_library()


def test_two_processes_may_compile_at_once_and_the_next_finds_the_library(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from morphserve.runtime.kernels.native import build; "
        "print(build(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1]
    library = Path(printed[0])
    assert list(tmp_path.iterdir()) == [library]
    built = library.stat().st_mtime_ns
    assert build(tmp_path) == library
    assert library.stat().st_mtime_ns == built
