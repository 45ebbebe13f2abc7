"""The moment at which key/value caches are packed, which is mlx-lm's.

mlx-lm looks after every pass whether a cache has reached `quantized_kv_start` tokens and packs it
then; the pass before still saw it plain. A block must therefore not reach over that point: its
tokens up to there are verified over the plain cache, the rest over the packed one, as plain
decoding would run them.
"""

from __future__ import annotations

from typing import Any

from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import RotatingKVCache

from draftloom.errors import UsageError
from draftloom.kv_cache import KVQuantization

__all__ = ["KVConversion"]

UNLIMITED = 2**31


class KVConversion:
    """Packs the caches of one generation at the moments at which mlx-lm would.

    The conversion puts another object into the list of caches. It waits for the next pass, so that
    a speculation can cut its block until then.

    Args:
        settings: None packs nothing.
        cache: the target's caches; entries are replaced in this list.

    Raises:
        UsageError: a cache that cannot be packed (one that was given with the request).
    """

    def __init__(self, settings: KVQuantization | None, cache: list[Any]) -> None:
        self._settings = settings
        self._cache = cache
        self._ran = False
        if settings is not None and any(isinstance(entry, RotatingKVCache) for entry in cache):
            raise UsageError(
                "a sliding-window cache cannot be quantized", "leave kv_bits out, or give no cache"
            )

    def before_pass(self) -> None:
        """The target is about to run. The first pass of a generation runs on what it is given."""
        if self._ran:
            self.settle()
        self._ran = True

    def settle(self) -> None:
        """Pack what has become long enough. Nothing is taken back afterwards."""
        settings = self._settings
        if settings is not None and self._ran:
            maybe_quantize_kv_cache(
                self._cache,
                quantized_kv_start=settings.quantized_kv_start,
                kv_group_size=settings.kv_group_size,
                kv_bits=settings.kv_bits,
            )

    @property
    def room(self) -> int:
        """Draft tokens that the next block may hold without reaching over a conversion."""
        if self._settings is None:
            return UNLIMITED
        start = self._settings.quantized_kv_start
        plain = [e.offset for e in self._cache if hasattr(e, "to_quantized")]
        return min((start - 1 - offset for offset in plain if offset < start), default=UNLIMITED)
