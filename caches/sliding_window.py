"""Sliding window: a rotating cache goes back, also after its window has wrapped.

mlx-lm's cache overwrites the oldest row of a full ring with every single token, and moves a
block's rows into temporal order, dropping what no query of the block may see. Taking rows back by
its own `trim` is wrong once it has wrapped. Here:

- A block of two or more goes through a stand-in, which puts the window in temporal order and
  appends to it. What is kept besides the window are the rows of the block and one row before the
  window, in the cache's own buffer; going back is a slice of it.
- A block of one is written in place by the cache itself; nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from draftloom.contracts import CacheKind, ComponentInfo
from draftloom.errors import UsageError

__all__ = ["SlidingWindowRollback"]


class SlidingWindowRollback:
    """Rolls rotating key/value caches back. Exact; after a wrap the keys stand in another order
    than in plain decoding, which a float sum feels (about 1e-5 in float32)."""

    info = ComponentInfo(
        "sliding-window",
        "sliding window: append in temporal order, cut the end off",
        cache_kinds=(CacheKind.SLIDING_WINDOW,),
    )

    def begin(self, entry: Any, block: mx.array) -> _Appended | _InPlace:
        """Prepare the cache for the verification of block [B, K+1].

        Raises:
            UsageError: a cache that is not mlx-lm's rotating one.
        """
        if not isinstance(entry, RotatingKVCache):
            raise UsageError(f"sliding-window cannot take back a {type(entry).__name__}")
        return _InPlace(entry) if block.shape[1] == 1 else _Appended(entry)


def _commit_count(num_accepted: Sequence[int]) -> int:
    if len(set(num_accepted)) > 1:
        raise ValueError("a cache with one offset cannot keep different counts a row")
    return num_accepted[0]


class _InPlace:
    """One token: the ring is written as plain decoding writes it.

    Of a full ring that overwrites the oldest row. No later token may see that row, since the token
    that comes next takes its place in the window: going back over one token needs no copy of it.
    """

    reforwards = False

    def __init__(self, cache: RotatingKVCache) -> None:
        self.entry = cache
        self._base = cache.offset

    def commit(self, num_accepted: Sequence[int]) -> None:
        if _commit_count(num_accepted) or self.entry.offset != self._base + 1:
            raise ValueError(f"the cache ends at {self.entry.offset}, not {self._base + 1}")

    def abort(self) -> None:
        written = self.entry.offset - self._base
        self.entry.offset -= written
        self.entry._idx -= written


class _Appended:
    """A block: its rows are appended behind the window."""

    reforwards = False

    def __init__(self, cache: RotatingKVCache) -> None:
        self._cache = cache
        self._base = cache.offset
        self._rows = min(cache.offset, cache.max_size)
        self.entry = _AppendingEntry(cache)

    def commit(self, num_accepted: Sequence[int]) -> None:
        self._go_to(_commit_count(num_accepted) + 1)

    def abort(self) -> None:
        if self._cache.offset != self._base:
            self._go_to(0)

    def _go_to(self, tokens: int) -> None:
        """Keep so many tokens of the block."""
        cache = self._cache
        if cache.offset < self._base + tokens:
            raise ValueError(f"the cache ends at {cache.offset}, before {self._base + tokens}")
        cache.offset = self._base + tokens
        cache._idx = self._rows + tokens
        if not cache.offset:
            cache.keys = cache.values = None
        elif cache.keys.shape[2] > cache._idx:
            cache.keys = cache.keys[..., : cache._idx, :]
            cache.values = cache.values[..., : cache._idx, :]


class _AppendingEntry:
    """Stands in for a rotating cache during verify: appends, drops nothing that may come back.

    Args:
        cache: written by every update.
    """

    def __init__(self, cache: RotatingKVCache) -> None:
        self._cache = cache
        self._ordered = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, Hkv, T, D]; gives the rows that mlx-lm's own cache gives for T tokens."""
        cache, tokens = self._cache, keys.shape[2]
        before = min(cache.offset, cache.max_size - 1)
        if cache.offset:
            if not self._ordered:
                size = min(cache.offset, cache.max_size)
                cache.keys, cache.values = (
                    self._last(cache._temporal_order(v), size) for v in (cache.keys, cache.values)
                )
            keys = mx.concatenate([cache.keys, keys], axis=2)
            values = mx.concatenate([cache.values, values], axis=2)
        self._ordered = True
        cache.keys, cache.values = keys, values
        cache.offset += tokens
        cache._idx = keys.shape[2]
        return self._last(keys, before + tokens), self._last(values, before + tokens)

    def _last(self, rows: mx.array, size: int) -> mx.array:
        """The newest rows, and the first `keep` of them that never leave."""
        drop, keep = rows.shape[2] - size, self._cache.keep
        if drop <= 0:
            return rows
        if not keep:
            return rows[..., drop:, :]
        return mx.concatenate([rows[..., :keep, :], rows[..., keep + drop :, :]], axis=2)

    def make_mask(
        self, tokens: int, window_size: int | None = None, return_array: bool = False
    ) -> Any:
        """mlx-lm's own mask; for one token, over rows in temporal order."""
        if tokens > 1:
            return self._cache.make_mask(tokens, window_size=window_size, return_array=return_array)
        rows = min(self._cache.offset, self._cache.max_size - 1) + 1
        if window_size is None or rows <= window_size:
            return None
        return mx.arange(rows) >= rows - window_size
