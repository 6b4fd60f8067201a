"""Fixtures of the engine's tests."""

import pytest
import torch

from morphserve.runtime.kernels import Kernels, load_kernels


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_kernels(request.param)
