"""Features of the frozen target: computed as they are needed, or once, into files.

A cache is a folder with `index.json` and shards in safetensors. The index names what the features
are of (target, taps, data) and the sha256 of every shard; a shard is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from draftloom.contracts import TargetAdapter
from draftloom.errors import DraftloomError, UsageError

from .document import Packed

__all__ = ["FeatureCache", "FeatureError", "OnlineFeatures", "human"]

SHARD_BYTES = 64 * 2**20
"""About the size of a shard."""


class FeatureError(DraftloomError):
    """A feature cache that cannot be written, or that is not what was written."""


def human(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class OnlineFeatures:
    """Runs the target for every batch.

    Args:
        target: tapped.
        sequences: all of them.
        with_logits: whether the target's logits are wanted as well.
        width: tokens that every batch is padded to; 0 is its longest sequence.
    """

    def __init__(
        self,
        target: TargetAdapter,
        sequences: Sequence[Packed],
        *,
        with_logits: bool = False,
        width: int = 0,
    ) -> None:
        self._target, self._sequences, self._with_logits = target, sequences, with_logits
        self._width = width

    def __call__(self, numbers: Sequence[int]) -> tuple[mx.array, mx.array | None]:
        """Features [R, S, F], and logits [R, S, V] or None.

        Raises:
            UsageError: the target has no taps.
        """
        rows = [self._sequences[n].ids for n in numbers]
        longest = max(self._width, *map(len, rows))
        # Rows past a sequence's end come after all that is seen: what they hold is of no matter.
        padded = mx.array(np.stack([np.pad(row, (0, longest - len(row))) for row in rows]))
        output = self._target.forward(padded, self._target.make_cache())
        if output.features is None:
            raise UsageError("the target gives no hidden states", "its adapter has no taps")
        logits = mx.stop_gradient(output.logits) if self._with_logits else None
        return mx.stop_gradient(output.features), logits


class FeatureCache:
    """Features of all sequences in files.

    Args:
        folder: of the cache; made by `build`.
        key: what the features are of; a cache of anything else is refused.
        lengths: tokens of every sequence.
        width: tokens that every batch is padded to; 0 is its longest sequence.
    """

    def __init__(
        self, folder: Path, key: dict[str, Any], lengths: Sequence[int], *, width: int = 0
    ) -> None:
        self._folder, self._key, self._lengths = folder, key, list(lengths)
        self._width = width
        self._shards: list[dict[str, Any]] = []
        self._checked: set[str] = set()

    @property
    def bytes(self) -> int:
        """Bytes of all features."""
        return sum(self._lengths) * int(self._key["width"]) * int(self._key["itemsize"])

    def build(
        self,
        source: OnlineFeatures,
        budget: int | None,
        on_done: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Write what is not there yet. Whole shards that an earlier call wrote are kept.

        Args:
            source: computes the features.
            budget: bytes at most; None is what the disk has.
            on_done: told (sequences written, sequences) after every shard.

        Raises:
            FeatureError: over the budget or the free space (before anything is written), a
                folder with features of something else, or a disk that filled meanwhile.
        """
        self._shards = self._read_index()
        done = sum(len(s["sequences"]) for s in self._shards)
        self._check_room(budget, done)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for numbers in self._plan(done):
                self._write_shard(numbers, source)
                on_done(numbers[-1] + 1, len(self._lengths))
        except (OSError, RuntimeError) as error:
            free = _free(self._folder)
            raise FeatureError(
                f"feature cache {self._folder} cannot be written: {error} ({human(free)} free)",
                "make room and start again: whole shards are kept",
            ) from error

    def _check_room(self, budget: int | None, done: int) -> None:
        size, free = self.bytes, _free(self._folder)
        missing = sum(self._lengths[done:]) * self._key["width"] * self._key["itemsize"]
        tokens = sum(self._lengths)
        if budget is not None and size > budget:
            raise FeatureError(
                f"features of {tokens} tokens need {human(size)}, the budget is {human(budget)}",
                "raise the budget, give less data, or leave the cache out (features online)",
            )
        if missing > 0.98 * free:
            raise FeatureError(
                f"features of {tokens} tokens need {human(missing)} more, {self._folder} has "
                f"{human(free)} free",
                "make room, or leave the cache out (features online)",
            )

    def _plan(self, done: int) -> list[list[int]]:
        """Sequence numbers of the shards still to be written."""
        token = int(self._key["width"]) * int(self._key["itemsize"])
        plan: list[list[int]] = []
        size = SHARD_BYTES
        for number in range(done, len(self._lengths)):
            if size >= SHARD_BYTES:
                plan.append([])
                size = 0
            plan[-1].append(number)
            size += self._lengths[number] * token
        return plan

    def _write_shard(self, numbers: list[int], source: OnlineFeatures) -> None:
        arrays = {}
        for number in numbers:
            arrays[str(number)] = source([number])[0][0]
            mx.eval(arrays[str(number)])
        name = f"features-{len(self._shards):05d}.safetensors"
        temporary = self._folder / f".writing-{name}"
        mx.save_safetensors(str(temporary), arrays)
        os.replace(temporary, self._folder / name)
        entry = {"file": name, "sha256": _sha256(self._folder / name), "sequences": numbers}
        self._shards.append(entry)
        index = {"key": self._key, "lengths": self._lengths, "shards": self._shards}
        temporary = self._folder / ".writing-index.json"
        temporary.write_text(json.dumps(index), encoding="utf-8")
        os.replace(temporary, self._folder / "index.json")

    def _read_index(self) -> list[dict[str, Any]]:
        file = self._folder / "index.json"
        if not file.is_file():
            return []
        try:
            index = json.loads(file.read_text(encoding="utf-8"))
            same = index["key"] == self._key and index["lengths"] == self._lengths
            shards: list[dict[str, Any]] = index["shards"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FeatureError(f"{file} cannot be read: {error}", "delete the folder") from error
        if not same:
            raise FeatureError(
                f"{self._folder} holds features of another target, other taps or other data",
                "give another folder, or delete it",
            )
        return shards

    def __call__(self, numbers: Sequence[int]) -> tuple[mx.array, None]:
        """Features [R, S, F] of sequences, zeros past their ends.

        Raises:
            FeatureError: a shard is missing or is not what was written; names it.
        """
        rows = [self._of(number) for number in numbers]
        longest = max(self._width, *(row.shape[0] for row in rows))
        padded = [mx.pad(row, [(0, longest - row.shape[0]), (0, 0)]) for row in rows]
        return mx.stack(padded), None

    def _of(self, number: int) -> mx.array:
        shard = next(s for s in self._shards if number in s["sequences"])
        file = self._folder / shard["file"]
        if shard["file"] not in self._checked:
            if not file.is_file() or _sha256(file) != shard["sha256"]:
                state = "has changed since it was written" if file.is_file() else "is missing"
                raise FeatureError(
                    f"feature shard {file} {state}", "delete the folder: it is made again"
                )
            self._checked.add(shard["file"])
        arrays = mx.load(str(file))  # lazy: reads the one sequence only
        assert isinstance(arrays, dict)
        return arrays[str(number)]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _free(folder: Path) -> int:
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free
