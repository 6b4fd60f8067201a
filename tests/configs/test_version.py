"""The version is told wherever the package runs from."""

from importlib import metadata

import pytest

from morphserve.configs.version import UNINSTALLED, version


def test_a_checkout_that_is_not_installed_has_a_version_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert version() == metadata.version("morphserve")
    version.cache_clear()

    def not_there(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_there)
    assert version() == UNINSTALLED
    version.cache_clear()
