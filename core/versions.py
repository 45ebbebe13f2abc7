"""Versions of what is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["NOT_INSTALLED", "version_of"]

NOT_INSTALLED = "unknown (not installed)"


def version_of(name: str) -> str:
    """The version of a distribution; `NOT_INSTALLED` where there is none, as of a source tree that
    is imported from where it lies."""
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED
