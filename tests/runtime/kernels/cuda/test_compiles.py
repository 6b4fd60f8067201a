"""Every kernel compiles for the GPUs it is meant for, into the machine code that is meant."""

import pytest
from offline_compile import ARCHITECTURES, Compiled, compile_launches
from sass import TENSOR

MULTIPLY = {"_attend_run", "_prefill", "_multiply"}  # kernels whose loop must use tensor cores


@pytest.fixture(scope="module")
def kernels() -> list[Compiled]:
    return compile_launches("cuda_launches:every_kernel", archs=(80, 90))


def test_nothing_spills(kernels: list[Compiled]) -> None:
    assert [(k.name, k.arch, k.spilled_bytes) for k in kernels if k.spilled_bytes] == []


def test_programs_fit_a_multiprocessor(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        assert kernel.shared_bytes <= ARCHITECTURES[kernel.arch].shared_limit, kernel
        assert kernel.programs_per_sm >= 1, kernel


def test_attention_and_quantised_linears_multiply_on_tensor_cores(kernels: list[Compiled]) -> None:
    multiplying = [kernel for kernel in kernels if kernel.name in MULTIPLY]
    assert {(k.name, k.arch) for k in multiplying} == {(n, a) for n in MULTIPLY for a in (80, 90)}
    for kernel in multiplying:
        assert any(kernel.loop.get(kind, 0) for kind in TENSOR), kernel


def test_what_attention_and_quantised_linears_read_most_they_read_16_bytes_at_a_time(
    kernels: list[Compiled],
) -> None:
    for kernel in kernels:
        if kernel.name in MULTIPLY:
            assert kernel.loop.get("LDGSTS.128", 0) + kernel.loop.get("LDG.128", 0), kernel
