"""Quantized key/value caches: the settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import attrs

from draftloom.errors import UsageError, did_you_mean
from draftloom.model_info import ModelInfo

__all__ = ["GROUP_SIZES", "KVQuantization", "QuantizesKV"]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


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
