"""Fixtures of the engine's tests."""

from pathlib import Path

import pytest

from morphserve.runtime.kernels import Kernels, load_kernels


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_kernels(request.param)


@pytest.fixture(scope="session")
def bundle(demo_bundle: Path) -> str:
    """The demo model's, as settings name it."""
    return str(demo_bundle)
