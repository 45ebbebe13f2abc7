"""The feature cache: what it gives, what it refuses, what it notices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from draftloom.apps.train import features as module
from draftloom.apps.train.features import FeatureCache, FeatureError, human

LENGTHS = [3, 5, 4]
KEY: dict[str, Any] = {"target": "t", "taps": [1], "width": 2, "itemsize": 4}


class Source:
    """Features that say which sequence they are of; counts what was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, numbers: Sequence[int]) -> tuple[mx.array, None]:
        (number,) = numbers
        self.asked.append(number)
        return mx.full((1, LENGTHS[number], 2), number + 0.5), None


def cache(folder: Path, **changes: Any) -> FeatureCache:
    return FeatureCache(folder, {**KEY, **changes}, LENGTHS)


def built(folder: Path) -> tuple[FeatureCache, Source]:
    made, source = cache(folder), Source()
    made.build(source, None)  # type: ignore[arg-type]
    return made, source


def test_cache_gives_what_was_computed(tmp_path: Path) -> None:
    made, source = built(tmp_path / "c")
    found, logits = made([2, 0])
    assert logits is None
    assert found[:, :, 0].tolist() == [[2.5] * 4, [0.5] * 3 + [0.0]]
    assert source.asked == [0, 1, 2]


def test_whole_shards_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    first = cache(tmp_path / "c")

    class Failing(Source):
        def __call__(self, numbers: Sequence[int]) -> tuple[mx.array, None]:
            if numbers == [2]:
                raise OSError("No space left on device")
            return super().__call__(numbers)

    with pytest.raises(FeatureError, match=r"No space left on device \(.* free\)"):
        first.build(Failing(), None)  # type: ignore[arg-type]
    made, source = built(tmp_path / "c")
    assert source.asked == [2]
    assert made([1])[0].shape == (1, 5, 2)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    built(tmp_path / "c")
    shard = tmp_path / "c" / "features-00000.safetensors"
    if damage == "changed":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(bytes(data))
    else:
        shard.unlink()
    again, source = built(tmp_path / "c")
    assert source.asked == []
    with pytest.raises(FeatureError, match=r"features-00000\.safetensors (has changed|is missing)"):
        again([0])


def test_budget_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    made, source = cache(tmp_path / "c"), Source()
    assert made.bytes == 12 * 2 * 4
    with pytest.raises(FeatureError, match="12 tokens need 96 bytes, the budget is 95 bytes"):
        made.build(source, 95)  # type: ignore[arg-type]
    assert source.asked == []
    assert not (tmp_path / "c").exists()


def test_full_disk_is_told_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free", lambda folder: 50)
    with pytest.raises(FeatureError, match=r"need 96 bytes more, .* has 50 bytes free"):
        built(tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("change", [{"target": "u"}, {"taps": [2]}], ids=["target", "taps"])
def test_features_of_something_else_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    built(tmp_path / "c")
    with pytest.raises(FeatureError, match="another target, other taps or other data"):
        cache(tmp_path / "c", **change).build(Source(), None)  # type: ignore[arg-type]


def test_broken_index_is_named(tmp_path: Path) -> None:
    built(tmp_path / "c")
    (tmp_path / "c" / "index.json").write_text("{")
    with pytest.raises(FeatureError, match=r"index\.json cannot be read"):
        built(tmp_path / "c")


def test_sizes_for_people() -> None:
    assert [human(n) for n in (5, 2048, 3 * 2**30)] == ["5 bytes", "2.0 KiB", "3.0 GiB"]
