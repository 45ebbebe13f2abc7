"""Snapshot: keep what the cache was, put it back, and run the accepted tokens again.

Serves every kind of cache. Costs a second pass over the accepted tokens whenever fewer were
accepted than verified, and for caches that write in place a copy of them a cycle; recurrent
layers replace their arrays whole, so that keeping them costs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from draftloom.contracts import CacheKind, ComponentInfo

__all__ = ["SnapshotRollback"]


class SnapshotRollback:
    """Restores the cache and has the accepted tokens run again."""

    info = ComponentInfo(
        "snapshot",
        "any cache: restore it and run the accepted tokens again",
        cache_kinds=tuple(CacheKind),
    )

    def begin(self, entry: Any, block: mx.array) -> _Snapshot | _Offset:
        """Keep what is needed to restore the cache as it is before block [B, K+1]."""
        appends = isinstance(entry, KVCache | QuantizedKVCache)
        return _Offset(entry) if appends else _Snapshot(entry)


class _Offset:
    """An append-only cache: its rows before the end are never rewritten."""

    reforwards = True

    def __init__(self, entry: Any) -> None:
        self.entry = entry
        self._base = entry.offset

    def commit(self, num_accepted: Sequence[int]) -> None:
        """Everything was accepted: the cache is as it should be."""

    def abort(self) -> None:
        self.entry.trim(self.entry.offset - self._base)


class _Snapshot:
    reforwards = True

    def __init__(self, entry: Any) -> None:
        self.entry = entry
        self._saved = _copy(vars(entry))

    def commit(self, num_accepted: Sequence[int]) -> None:
        """Everything was accepted: the cache is as it should be."""

    def abort(self) -> None:
        vars(self.entry).clear()
        vars(self.entry).update(_copy(self._saved))


def _copy(value: Any) -> Any:
    """A copy whose arrays are safe from in-place writes: a new array object over the same data."""
    if isinstance(value, mx.array):
        return mx.array(value)
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(v) for v in value)
    if hasattr(value, "__dict__"):
        other = copy.copy(value)
        vars(other).update(_copy(vars(value)))
        return other
    return value
