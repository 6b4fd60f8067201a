"""Every kernel compiles for the GPUs it is meant for: nothing spills and nothing is too large."""

import pytest
from compile_cases import CASES
from offline_compile import ARCHITECTURES, Compiled, compile_launches
from sass import TENSOR


def multiplies_on_tensor_cores(kernel: Compiled) -> bool:
    return any(kernel.counts.get(kind, 0) for kind in TENSOR)


@pytest.fixture(scope="module")
def kernels() -> list[Compiled]:
    return compile_launches(f"{CASES}:every_kernel", archs=(80, 90))


def test_nothing_spills(kernels: list[Compiled]) -> None:
    assert [(k.name, k.arch, k.spilled_bytes) for k in kernels if k.spilled_bytes] == []


def test_programs_fit_the_shared_memory(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        assert kernel.shared_bytes <= ARCHITECTURES[kernel.arch].shared_limit, kernel
        assert kernel.programs_per_sm >= 1, kernel
