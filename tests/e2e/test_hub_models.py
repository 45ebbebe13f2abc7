"""`draftloom models`: what is here of a pair, and whether it fits."""

import json
from pathlib import Path

import pytest

from draftloom import device
from draftloom.adapters.hub import Repository, cached, cached_names
from draftloom.adapters.hub.files import INDEX
from draftloom.apps.cli.models import Row, rows

COMMIT = "c" * 40
TOTAL = 17_900_000_000


@pytest.fixture(autouse=True)
def _no_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def store(root: Path, name: str, files: dict[str, str], ref: str = "main") -> Path:
    """Put a repository in a cache."""
    folder = root / Repository(name).cache_folder
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file, text in files.items():
        (snapshot / file).write_text(text)
    (folder / "refs").mkdir()
    (folder / "refs" / ref).write_text(COMMIT)
    return snapshot


def sharded(size: int = TOTAL) -> dict[str, str]:
    """A model of two shards whose second one is missing."""
    table = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = {"metadata": {"total_size": size}, "weight_map": table}
    return {"config.json": "{}", INDEX: json.dumps(index), "model-1.safetensors": "x" * 10}


def row_of(root: Path, target: str) -> Row:
    """The row of a target."""
    (found,) = [row for row in rows(root) if row.target == target]
    return found


def test_what_is_cached(tmp_path: Path) -> None:
    assert cached_names(tmp_path / "none") == []
    snapshot = store(tmp_path, "lab/big", sharded(), ref="v1")
    assert cached(Repository("lab/big"), tmp_path) is None
    found = cached(Repository("lab/big", "v1"), tmp_path)
    assert found == cached(Repository("lab/big", COMMIT), tmp_path)
    assert found
    assert (found.whole, found.weights) == (False, TOTAL)
    (snapshot / "model-2.safetensors").write_text("y" * 5)
    found = cached(Repository("lab/big", "v1"), tmp_path)
    assert found
    assert (found.whole, found.weights) == (True, 15)
    (snapshot / INDEX).write_text("{")
    found = cached(Repository("lab/big", "v1"), tmp_path)
    assert found
    assert (found.whole, found.weights) == (False, None)
    assert cached_names(tmp_path) == ["lab/big"]


def test_a_cached_quantization_has_a_row_and_a_verdict(tmp_path: Path) -> None:
    name = "mlx-community/Qwen3.5-9B-4bit"
    store(tmp_path, name, sharded())
    store(tmp_path, "mlx-community/Qwen3.5-9B-4bit-finetune", sharded())
    row = row_of(tmp_path, name)
    assert row.drafter == "z-lab/Qwen3.5-9B-DFlash"
    assert row.source == "public"
    assert row.weights is None, "the drafter is not here"
    assert row.fits(TOTAL - 1) is False, "the target alone is too large"
    assert row.fits(TOTAL * 2) is None
    assert row.fits(None) is None
    store(tmp_path, row.drafter, {"config.json": "{}", "model.safetensors": "z" * 100})
    row = row_of(tmp_path, name)
    assert row.weights == TOTAL + 100
    assert row.fits(TOTAL + 100) is True
    assert row.fits(TOTAL + 99) is False
    assert row.as_data(None)["target_cached"] == "partly"
    assert row.as_data(None)["drafter_cached"] == "yes"
    assert all(not row.target.endswith("finetune") for row in rows(tmp_path))


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device, "CONTAINER_LIMIT", limit)
    machine = device.device_memory()
    assert machine
    limit.write_text("max\n")
    assert device.device_memory() == machine
    limit.write_text("1048576\n")
    assert device.device_memory() == 1048576
