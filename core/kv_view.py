"""What a verify pass may be shown in place of a plain key/value cache."""

from __future__ import annotations

from typing import Any

__all__ = ["KVCacheView"]


class KVCacheView:
    """Stands in for an mlx-lm `KVCache`: what is written goes to the cache, and `keys`, `values`
    (the whole buffers) and `offset` are the cache's. Its masks are causal: a query sees itself and
    what is before it, and a window's worth of that where the model asks for one.

    Args:
        entry: the cache.
    """

    def __init__(self, entry: Any) -> None:
        self._entry = entry

    @property
    def whole(self) -> Any:
        """The cache."""
        return self._entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)
