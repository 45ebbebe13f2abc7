"""The wheel holds every module and data file, and the check notices when one is missing."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "check_wheel", Path(__file__).with_name("check_wheel.py")
)
assert spec
assert spec.loader
check_wheel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_wheel)

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, with a stand-in for the weights, which are large."""
    folder = tmp_path / "source"
    check_wheel.copy_sources(check_wheel.ROOT, folder)
    for weights in (folder / "adapters" / "bundled").rglob("*.safetensors"):
        weights.write_bytes(b"weights")
    return folder


def test_wheel_holds_every_file(source: Path, tmp_path: Path) -> None:
    for name in ("kernels/gated_delta/body.h", "adapters/bundled/a/b/config.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
    wheel = check_wheel.build_wheel(source, tmp_path / "dist")
    assert "draftloom/kernels/gated_delta/body.h" in check_wheel.expected_members(source)
    assert "draftloom/adapters/bundled/a/b/config.json" in check_wheel.expected_members(source)
    assert check_wheel.missing_members(wheel, source) == []
    assert check_wheel.surplus_members(wheel, source) == []


def test_unlisted_package_is_noticed(source: Path, tmp_path: Path) -> None:
    (source / "drafters" / "unlisted").mkdir()
    (source / "drafters" / "unlisted" / "__init__.py").write_text("")
    wheel = check_wheel.build_wheel(source, tmp_path / "dist")
    missing = check_wheel.missing_members(wheel, source)
    assert missing == ["draftloom/drafters/unlisted/__init__.py"]
