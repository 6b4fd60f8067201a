"""Compiling, caching and the stated fallback."""

import logging
import os
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


SANITISED = """
import sys, pytest
from morphserve.runtime.kernels import native
native.FLAGS += ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
sys.exit(pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_kernels_neither_leave_their_memory_nor_rely_on_undefined_behaviour(tmp_path: Path) -> None:
    found = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    if not Path(found.stdout.strip()).is_absolute():
        pytest.skip("the compiler has no address sanitiser")
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    tests = [
        str(Path(__file__).with_name(f"test_{name}.py"))
        for name in ("linear", "attention", "pointwise", "sampler")
    ]
    done = subprocess.run(
        [sys.executable, "-c", SANITISED, *tests], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
