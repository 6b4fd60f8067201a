"""The version of this package."""

from functools import cache
from importlib import metadata

UNINSTALLED = "0+checkout"  # run from a checkout, by PYTHONPATH


@cache
def version() -> str:
    """As it is installed."""
    try:
        return metadata.version("morphserve")
    except metadata.PackageNotFoundError:
        return UNINSTALLED
