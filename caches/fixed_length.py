"""A key/value cache seen at its full allocated length, with a mask over what is not there yet.

MLX-CUDA plans its fused attention for the exact number of keys, and makes the plan anew whenever
that number changes: with a block a cycle, every cycle and layer (measured on an H100: about 90 ms
a cycle for a model whose step takes 3). At the allocated length the number changes every few
hundred tokens only.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from draftloom.device import on_cuda

__all__ = ["FixedLengthEntry", "serves"]


def serves(entry: Any) -> bool:
    """Whether this is a cache to be seen so here: a plain KVCache, on CUDA."""
    return type(entry) is KVCache and on_cuda()


class FixedLengthEntry:
    """Stands in for a KVCache during verify; writes go to the cache itself.

    Args:
        entry: the cache.
    """

    def __init__(self, entry: KVCache) -> None:
        self._entry = entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, Hkv, T, D] and give all allocated rows; for T = 1 the valid ones (one row
        needs no plan)."""
        valid = self._entry.update_and_fetch(keys, values)
        return valid if keys.shape[2] == 1 else (self._entry.keys, self._entry.values)

    def make_mask(
        self, tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | None:
        """Which of the rows there will be after T more tokens a query may see: [T, rows] bool."""
        if tokens == 1 and window_size is None:
            return None
        query = self._entry.offset + mx.arange(tokens)[:, None]
        key = mx.arange(_rows_after(self._entry, tokens))[None]
        mask = key <= query
        return mask if window_size is None else mask & (query < key + window_size)


def _rows_after(entry: KVCache, tokens: int) -> int:
    """Allocated rows once KVCache has taken in `tokens` more: it grows in steps, from its end."""
    step, end = entry.step, entry.offset
    rows = 0 if entry.keys is None else entry.keys.shape[2]
    if end + tokens <= rows:
        return int(rows)
    base = end if end % step else rows
    return int(base + -(-tokens // step) * step)
