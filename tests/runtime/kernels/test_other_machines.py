"""The C kernels as they are compiled for machines without this one's instructions."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = [HERE / f"test_{name}.py" for name in ("attention", "linear", "pointwise", "sampler")]
RUN_TESTS = """
import sys
import pytest
from morphserve.runtime.kernels import native
native.FLAGS += ("-O1", f"-march={sys.argv[1]}")
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def _has(feature: str) -> bool:
    found = Path("/proc/cpuinfo")
    return found.exists() and feature in found.read_text().split()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86's generations")
@pytest.mark.parametrize(
    "machine, feature", [("x86-64", "sse2"), ("haswell", "avx2"), ("skylake-avx512", "avx512bw")]
)
def test_older_machines_compute_the_same(machine: str, feature: str, tmp_path: Path) -> None:
    if not _has(feature):
        pytest.skip(f"this machine has no {feature}")
    command = [sys.executable, "-c", RUN_TESTS, machine, *TESTS]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
