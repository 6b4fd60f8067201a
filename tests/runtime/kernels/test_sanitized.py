"""The C kernels under the compiler's sanitisers, which see errors that no result shows."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from morphserve.runtime.kernels import native

HERE = Path(__file__).parent
SOURCES = Path(native.__file__).parent
TESTS = sorted(
    set(HERE.glob("test_*.py"))
    - {HERE / f"test_{name}.py" for name in ("native", "other_machines", "sanitized")}
)
# The library is never taken from the user's cache: its key depends on the flags.
SANITISED = """
import sys
from morphserve.runtime.kernels import native
native.FLAGS += ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""
RUN_TESTS = """
import pytest
sys.exit(pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
OVERRUN = """
import torch
from morphserve.runtime.kernels.cpu import CpuKernels
x, weight, y = torch.randn(3, 20), torch.randn(20), torch.empty(3, 20)
rows = int(sys.argv[1])
args = (x.data_ptr(), None, weight.data_ptr(), 1e-5, rows, 20, y.data_ptr())
CpuKernels()._library.morph_rms_norm(*args)
"""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Python with kernels that look where they read and write: torch's memory is malloc's."""
    command = [native.find_compiler(), "-print-file-name=libasan.so"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not found.is_absolute():
        pytest.skip("the compiler has no address sanitiser")
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("sanitised")),
        "LD_PRELOAD": str(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }

    def run(code: str, *words: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", SANITISED + code, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_kernels_neither_leave_their_memory_nor_rely_on_undefined_behaviour(run: Run) -> None:
    done = run(RUN_TESTS, *TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_row_too_many_is_seen(run: Run) -> None:
    assert run(OVERRUN, 3).returncode == 0
    done = run(OVERRUN, 4)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def test_the_pool_does_each_piece_once_and_has_no_races(tmp_path: Path) -> None:
    program = tmp_path / "pool_stress"
    sources = [SOURCES / "pool.c", HERE / "pool_stress.c"]
    flags = ["-std=gnu11", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{SOURCES}"]
    compiled = subprocess.run(
        [native.find_compiler(), *flags, "-o", program, *sources], capture_output=True, text=True
    )
    if "cannot find" in compiled.stderr:
        pytest.skip("the compiler has no thread sanitiser")
    assert compiled.returncode == 0, compiled.stderr
    # The child of a fork starts helpers of its own.
    environment = os.environ | {"TSAN_OPTIONS": "die_after_fork=0"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitiser does not run where addresses are this random")
    assert done.returncode == 0, done.stderr
