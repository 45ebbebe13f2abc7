"""A key/value cache seen at its full allocated length, with a mask over what is not there yet.

MLX-CUDA plans its fused attention for the exact number of keys, and makes the plan anew whenever
that number changes: with a block a cycle, every cycle and layer (measured on an H100: about 90 ms
a cycle for a model whose step takes 3). At the allocated length the number changes every few
hundred tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from draftloom.contracts import CacheKind, TargetInfo
from draftloom.device import on_cuda
from draftloom.kernels.check import Check
from draftloom.kv_view import KVCacheView

__all__ = ["FixedLengthEntry", "by_default", "checks", "serves", "why_not_for"]

TF32 = 1.6e-2
"""Of attention on CUDA, whose products are rounded."""


def by_default() -> bool:
    """Whether `auto` shows caches so here."""
    return on_cuda()


def why_not_for(target: TargetInfo) -> str | None:
    """Why a target has no use for it; None where it has."""
    kinds = (CacheKind.ATTENTION, CacheKind.OTHER)
    if any(kind in target.cache_kinds for kind in kinds):
        return None
    return f"{target.model_type} has no plain key/value caches"


def serves(entry: Any) -> bool:
    """Whether this is a cache to be seen so here: a plain KVCache, on CUDA."""
    return type(entry) is KVCache and by_default()


class FixedLengthEntry(KVCacheView):
    """Stands in for a KVCache during verify; writes go to the cache itself.

    Args:
        entry: the cache.
    """

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


def checks() -> Iterator[Check]:
    """Attention over the allocated rows with the mask, against the valid rows alone: the same up
    to the order of sums, in float32 and bfloat16, at odd lengths and across a growth."""
    for dtype, tolerance in ((mx.float32, 1e-5), (mx.bfloat16, 1.6e-2)):
        for held, tokens in ((1, 3), (250, 16), (511, 5)):
            yield _check(dtype, held, tokens, TF32 if on_cuda() else tolerance)


def _check(dtype: mx.Dtype, held: int, tokens: int, tolerance: float) -> Check:
    keys = iter(mx.random.split(mx.random.key(5), 5))
    size, heads = 64, (4, 2)

    def normal(count: int, rows: int) -> mx.array:
        return mx.random.normal((1, count, rows, size), key=next(keys)).astype(dtype)

    before, block = ([normal(heads[1], rows) for _ in "kv"] for rows in (held, tokens))
    queries = normal(heads[0], tokens)

    def attend(fixed: bool) -> list[mx.array]:
        cache: Any = KVCache()
        cache.update_and_fetch(*before)
        entry = FixedLengthEntry(cache) if fixed else cache
        mask = entry.make_mask(tokens, return_array=True, window_size=None)
        k, v = entry.update_and_fetch(*block)
        return [mx.fast.scaled_dot_product_attention(queries, k, v, scale=size**-0.5, mask=mask)]

    kind = str(dtype).rpartition(".")[2]
    name = f"attention {kind} M{tokens} N{held + tokens} Hq{heads[0]} Hkv{heads[1]} D{size}"
    return Check(name, lambda: attend(True), lambda: attend(False), (tolerance,))


def _rows_after(entry: KVCache, tokens: int) -> int:
    """Allocated rows once KVCache has taken in `tokens` more: it grows in steps, from its end."""
    step, end = entry.step, entry.offset
    rows = 0 if entry.keys is None else entry.keys.shape[2]
    if end + tokens <= rows:
        return int(rows)
    base = end if end % step else rows
    return int(base + -(-tokens // step) * step)
