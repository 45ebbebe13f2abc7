"""What takes memory, how much of it, and the guard that looks before the system swaps.

Bytes are counted from shapes: caches are looked at after one token was run lazily, so that nothing
is computed and no family needs a formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import attrs
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from draftloom.device import default_limit
from draftloom.errors import UsageError, did_you_mean
from draftloom.kv_cache import KVQuantization
from draftloom.model_info import ModelInfo

__all__ = [
    "CacheCost",
    "KeepsContext",
    "MemorySettings",
    "MemoryUse",
    "Sketches",
    "UsesMemory",
    "WeightEstimate",
    "WorkShape",
    "array_bytes",
    "cache_bytes",
    "cache_costs",
    "module_bytes",
    "size_text",
]

GB = 10**9
ROWS = 256
"""Caches grow by so many tokens."""


@attrs.frozen
class MemorySettings:
    """How much memory a pipeline may take.

    Attributes:
        limit_gb: most that this process may hold on the device, in GB (10^9 bytes); None is what
            the device or the host has.
        context_length: tokens that caches are to hold; counted before weights are loaded.
        prefill_step_size: prompt tokens run at once.

    Raises:
        UsageError: a value out of range.
    """

    limit_gb: float | None = None
    context_length: int | None = None
    prefill_step_size: int = 2048

    def __attrs_post_init__(self) -> None:
        limit = self.limit_gb
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0
        ):
            raise UsageError(f"limit_gb must be above 0, got {limit!r}", "it counts 10^9 bytes")
        for name in ("context_length", "prefill_step_size"):
            value = getattr(self, name)
            if value is None and name == "context_length":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} must be at least 1, got {value!r}", "it counts tokens")

    @classmethod
    def of(cls, value: Any) -> MemorySettings:
        """Read ``{limit_gb = 8, context_length = 32768, prefill_step_size = 512}``.

        Raises:
            UsageError: no table, or a key that is not known.
        """
        if not isinstance(value, Mapping):
            raise UsageError(f"expected a table, got {value!r}", "write { limit_gb = 8 }")
        known = [field.name for field in attrs.fields(cls)]
        for key in value:
            if key not in known:
                raise UsageError(f"unknown key {key!r}", did_you_mean(key, known))
        return cls(**value)

    def as_data(self) -> dict[str, float]:
        """A table of what is not the default."""
        default, values = MemorySettings(), attrs.asdict(self)
        return {k: v for k, v in values.items() if v != getattr(default, k)}

    @property
    def limit(self) -> int | None:
        """Bytes that this process may hold; None where nobody says."""
        return default_limit() if self.limit_gb is None else int(self.limit_gb * GB)


@attrs.frozen
class MemoryUse:
    """What a generation held, in bytes.

    Attributes:
        target_weights, drafter_weights: of the models; 0 for a drafter without weights.
        kv_caches: the target's keys and values, as allocated at the end.
        recurrent_states: the target's states of fixed size.
        drafter_context: what the drafter kept of the text.
        features: the most hidden states that were taken at once for the drafter.
        tape: the most that recurrent layers recorded for one block.
        peak: the most that MLX held since the process began or the peak was reset.
        limit: what the guard went by; None where nobody says.
        prefill_step_size: the fewest prompt tokens that were run at once, the last chunk apart.
        shrunk: what the guard made smaller, and why; empty where it had nothing to do.
    """

    target_weights: int = 0
    drafter_weights: int = 0
    kv_caches: int = 0
    recurrent_states: int = 0
    drafter_context: int = 0
    features: int = 0
    tape: int = 0
    peak: int = 0
    limit: int | None = None
    prefill_step_size: int = 0
    shrunk: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the unit."""
        return {"unit": "bytes", **attrs.asdict(self), "shrunk": list(self.shrunk)}


@runtime_checkable
class UsesMemory(Protocol):
    """A drafter or a session that says what it holds."""

    def memory(self) -> Mapping[str, int]:
        """Bytes by name: ``weights`` of a drafter, ``context`` of a session."""


@runtime_checkable
class KeepsContext(Protocol):
    """A drafter whose sessions grow with the text."""

    def context_bytes(self, tokens: int) -> int:
        """Bytes that a session holds for so many tokens."""


@runtime_checkable
class Sketches(Protocol):
    """A target adapter's class that can run a model without weights, lazily."""

    def sketch(self, model: ModelInfo, dtype: mx.Dtype) -> tuple[Callable[..., Any], list[Any]]:
        """The model's forward (tokens, cache) and fresh caches, computing in `dtype`."""


@attrs.frozen
class WeightEstimate:
    """What weights will take.

    Attributes:
        size: bytes.
        dtype: what will be computed in.
    """

    size: int
    dtype: mx.Dtype


@attrs.frozen
class CacheCost:
    """Bytes of one cache by the tokens in it.

    Attributes:
        fixed: whatever the length.
        per_token: for each token.
        most: tokens that it keeps at most; None is all.
    """

    fixed: int = 0
    per_token: float = 0.0
    most: int | None = None

    def at(self, tokens: int) -> int:
        """Bytes as allocated for so many tokens."""
        rows = -(-tokens // ROWS) * ROWS
        return self.fixed + int(
            self.per_token * (rows if self.most is None else min(rows, self.most))
        )


def cache_costs(
    forward: Callable[..., Any], cache: list[Any], settings: KVQuantization | None
) -> tuple[tuple[CacheCost, ...], int]:
    """The cost of every cache of a target, from one token that is run and never computed.

    Args:
        forward: (tokens [1, 1], cache) -> logits, or an output that has them.
        cache: fresh ones; they are spoilt.
        settings: packs what mlx-lm packs; None leaves them plain.

    Returns:
        The costs, and the bytes of a number that the target computes with.
    """
    output = forward(mx.zeros((1, 1), dtype=mx.int32), cache)
    if settings is not None:
        from mlx_lm.generate import maybe_quantize_kv_cache  # slow to import: not for settings

        maybe_quantize_kv_cache(cache, 0, settings.kv_group_size, settings.kv_bits)
    itemsize = getattr(output, "logits", output).dtype.size
    return tuple(_cost(entry) for entry in cache), itemsize


def _cost(entry: Any) -> CacheCost:
    inner = getattr(entry, "caches", None)
    if inner is not None:
        costs = [_cost(part) for part in inner]
        return CacheCost(sum(c.fixed for c in costs), sum(c.per_token for c in costs))
    keys = getattr(entry, "keys", None)
    if keys is None:
        return CacheCost(int(getattr(entry, "nbytes", 0)))
    rows = (keys[0] if isinstance(keys, tuple | list) else keys).shape[2]
    return CacheCost(0, entry.nbytes / rows, getattr(entry, "max_size", None))


@attrs.frozen
class WorkShape:
    """What a forward of the target needs besides weights and caches, roughly.

    Attributes:
        hidden: D.
        inner: the widest row of a layer, in numbers.
        heads: query heads.
        itemsize: bytes of a number.
        features: F of the taps.
        whole_scores: whether attention writes its scores out, heads x tokens x length: on a CPU,
            over packed caches, and for heads wider than the fused kernels take.
    """

    hidden: int
    inner: int
    heads: int
    itemsize: int
    features: int
    whole_scores: bool

    @classmethod
    def of(
        cls, model: ModelInfo, hidden: int, features: int, itemsize: int, packed: bool
    ) -> WorkShape:
        """From a config; keys that it lacks are taken to be small."""
        config = model.text_config

        def number(*names: str) -> int:
            found = (config.get(name) for name in names)
            return next((v for v in found if isinstance(v, int)), 0)

        heads = number("num_attention_heads", "n_head") or 1
        head = number("head_dim") or hidden // heads
        experts = number("num_experts_per_tok") * number("moe_intermediate_size")
        inner = max(number("intermediate_size"), experts, heads * head)
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        return cls(hidden, inner, heads, itemsize, features, on_cpu or packed or head > 128)

    def at(self, tokens: int, length: int) -> int:
        """Bytes that a pass over `tokens` needs when the caches then hold `length`."""
        rows = 8 * self.hidden + 3 * self.inner + 2 * self.features
        scores = 3 * 4 * self.heads * tokens * length if self.whole_scores else 0
        return tokens * rows * self.itemsize + scores


# --- what is held ----------------------------------------------------------------------------


def cache_bytes(entry: Any) -> int:
    """Bytes that a cache holds, as allocated."""
    inner = getattr(entry, "caches", None)
    if inner is not None:
        return sum(cache_bytes(part) for part in inner)
    return array_bytes(value for _, value in tree_flatten(list(vars(entry).values())))


def module_bytes(module: Any) -> int:
    """Bytes of a module's parameters; 0 for what is none."""
    if not isinstance(module, nn.Module):
        return 0
    return array_bytes(value for _, value in tree_flatten(module.parameters()))


def array_bytes(arrays: Iterable[Any]) -> int:
    """Bytes of arrays; what is none counts nothing."""
    return sum(a.nbytes for a in arrays if isinstance(a, mx.array))


def size_text(count: int) -> str:
    """Bytes as people read them."""
    for unit, size in (("GB", GB), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
