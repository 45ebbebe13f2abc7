"""Versions, where draftloom is installed and where it is imported from a source tree."""

from __future__ import annotations

from importlib import metadata

import pytest

import draftloom
from draftloom.apps.bench.subjects import Subject
from draftloom.apps.demo import _versions
from draftloom.self_test_record import fingerprint
from draftloom.versions import NOT_INSTALLED, version_of


def test_installed() -> None:
    assert version_of("draftloom") == draftloom.__version__
    assert version_of("mlx") == metadata.version("mlx")


def test_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from draftloom.apps.bench.measure import Settings
    from draftloom.apps.bench.report import head
    from draftloom.apps.cli.doctor import _versions as of_doctor

    found = metadata.version

    def version(name: str) -> str:
        if name == "draftloom":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr("draftloom.versions.version", version)
    assert version_of("draftloom") == NOT_INSTALLED
    assert fingerprint()["draftloom"] == NOT_INSTALLED
    assert of_doctor()["draftloom"] == NOT_INSTALLED
    assert f"draftloom {NOT_INSTALLED}" in _versions()
    report = head(Subject("t", None, None, (), None, 8), Settings())
    assert report["versions"]["draftloom"] == NOT_INSTALLED
