"""Trim: an append-only attention cache goes back by moving its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from draftloom.contracts import CacheKind, ComponentInfo

__all__ = ["TrimRollback"]


class TrimRollback:
    """Rolls key/value caches back by their offset. Copies nothing and keeps no reference to a
    key or value buffer, which would defeat MLX's in-place updates."""

    info = ComponentInfo(
        "trim",
        "attention: move the end of the cache back",
        cache_kinds=(CacheKind.ATTENTION,),
    )

    def begin(self, entry: Any, block: mx.array) -> _Trimmed:
        """Remember where the cache ended before block [B, K+1]."""
        return _Trimmed(entry)


class _Trimmed:
    reforwards = False

    def __init__(self, entry: Any) -> None:
        self.entry = entry
        self._base = entry.offset

    def commit(self, num_accepted: Sequence[int]) -> None:
        if len(set(num_accepted)) > 1:
            raise ValueError("a cache with one offset cannot keep different counts a row")
        self._go_to(self._base + 1 + num_accepted[0])

    def abort(self) -> None:
        self._go_to(self._base)

    def _go_to(self, offset: int) -> None:
        if self.entry.offset < offset:
            raise ValueError(f"the cache ends at {self.entry.offset}, before {offset}")
        self.entry.trim(self.entry.offset - offset)
