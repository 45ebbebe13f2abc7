"""What a verify pass may be shown in place of a plain key/value cache."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

__all__ = ["KVCacheBehind", "KVCacheView"]


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


class KVCacheBehind(KVCacheView):
    """A cache of which rows at the end do not count: how many, the device alone knows. Passes that
    are traced are given the number; nobody else can use it.

    Args:
        entry: the cache.
        behind: [1] int32, rows.
    """

    def __init__(self, entry: Any, behind: mx.array) -> None:
        super().__init__(entry)
        self.behind = behind

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Not before the host knows.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("only a traced pass can go on from where the device alone knows")
