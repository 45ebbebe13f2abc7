"""Trim: an append-only attention cache goes back by moving its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from draftloom.contracts import CacheKind, ComponentInfo
from draftloom.kernel_settings import OFF, KernelSettings

from .fixed_length import FixedLengthEntry, serves

__all__ = ["TrimRollback"]


class TrimRollback:
    """Rolls key/value caches back by their offset. Copies nothing and keeps no reference to a
    key or value buffer, which would defeat MLX's in-place updates.

    Args:
        fixed_length: show verify the cache at its allocated length (see `.fixed_length`); by
            default where that pays, or as the operation ``fixed-length-caches`` is chosen.
    """

    info = ComponentInfo(
        "trim",
        "attention: move the end of the cache back",
        cache_kinds=(CacheKind.ATTENTION,),
    )

    def __init__(self, fixed_length: bool | None = None) -> None:
        self._fixed_length = fixed_length
        self._stand_in: Callable[[Any], Any] = FixedLengthEntry

    def tune(self, settings: KernelSettings) -> None:
        """Choose the operation ``fixed-length-caches``; an argument of the constructor wins."""
        use = settings.use("fixed-length-caches", off=OFF)
        if self._fixed_length is not None or use is None:
            return
        self._fixed_length = use != OFF
        if not isinstance(use, str):
            self._stand_in = use

    def begin(self, entry: Any, block: mx.array) -> _Trimmed:
        """Remember where the cache ended before block [B, K+1]."""
        fixed = serves(entry) if self._fixed_length is None else self._fixed_length
        return _Trimmed(entry, self._stand_in(entry) if fixed else entry)


class _Trimmed:
    reforwards = False

    def __init__(self, cache: Any, entry: Any) -> None:
        self.entry = entry
        self._cache = cache
        self._base = cache.offset

    def commit(self, num_accepted: Sequence[int]) -> None:
        if len(set(num_accepted)) > 1:
            raise ValueError("a cache with one offset cannot keep different counts a row")
        self._go_to(self._base + 1 + num_accepted[0])

    def abort(self) -> None:
        self._go_to(self._base)

    def _go_to(self, offset: int) -> None:
        if self._cache.offset < offset:
            raise ValueError(f"the cache ends at {self._cache.offset}, before {offset}")
        self._cache.trim(self._cache.offset - offset)
