"""Quantized key/value caches: the settings, and the moment of conversion, which is mlx-lm's.

mlx-lm looks after every pass whether a cache has reached `quantized_kv_start` tokens and packs it
then; the pass before still saw it plain. A block must therefore not reach over that point: its
tokens up to there are verified over the plain cache, the rest over the packed one, as plain
decoding would run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import attrs
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import RotatingKVCache

from draftloom.errors import UsageError, did_you_mean
from draftloom.model_info import ModelInfo

__all__ = ["GROUP_SIZES", "KVConversion", "KVQuantization", "QuantizesKV"]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
UNLIMITED = 2**31


@attrs.frozen
class KVQuantization:
    """How the target's key/value caches are packed; names and meanings are mlx-lm's.

    Attributes:
        kv_bits: bits of a number: 2, 3, 4, 5, 6 or 8.
        kv_group_size: numbers that share a scale: 32, 64 or 128; divides the size of a head.
        quantized_kv_start: tokens in the cache from which on it is packed.

    Raises:
        UsageError: a value that is none of these.
    """

    kv_bits: int
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __attrs_post_init__(self) -> None:
        for name, known in (("kv_bits", BITS), ("kv_group_size", GROUP_SIZES)):
            value = getattr(self, name)
            if isinstance(value, bool) or value not in known:
                listing = ", ".join(map(str, known))
                raise UsageError(f"{name} cannot be {value!r}", f"it can be {listing}")
        start = self.quantized_kv_start
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise UsageError(
                f"quantized_kv_start must be 0 or more, got {start!r}", "it counts tokens"
            )

    @classmethod
    def of(cls, value: Any) -> KVQuantization:
        """Read ``{kv_bits = 8, kv_group_size = 64, quantized_kv_start = 5000}``.

        Raises:
            UsageError: no table, a key that is not known, `kv_bits` missing.
        """
        if not isinstance(value, Mapping):
            raise UsageError(f"expected a table, got {value!r}", "write { kv_bits = 8 }")
        known = [field.name for field in attrs.fields(cls)]
        for key in value:
            if key not in known:
                raise UsageError(f"unknown key {key!r}", did_you_mean(key, known))
        if "kv_bits" not in value:
            raise UsageError("a quantized cache needs kv_bits", "8 loses next to nothing")
        return cls(**value)

    def as_data(self) -> dict[str, int]:
        """A table of what is not the default."""
        default = type(self)(self.kv_bits)
        values = attrs.asdict(self)
        return {k: v for k, v in values.items() if k == "kv_bits" or v != getattr(default, k)}

    def __str__(self) -> str:
        return (
            f"{self.kv_bits} bits in groups of {self.kv_group_size}, "
            f"from token {self.quantized_kv_start} on"
        )


@runtime_checkable
class QuantizesKV(Protocol):
    """A target adapter's class that knows whether a model runs on packed caches."""

    def why_not_quantized_kv(self, model: ModelInfo, settings: KVQuantization) -> str:
        """Why the caches of a model cannot be packed so; empty where they can. Loads no weight."""


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
