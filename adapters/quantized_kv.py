"""Whether a family runs on quantized key/value caches, found out without weights.

mlx-lm packs every cache that has a `to_quantized` and hands the packed arrays to the family's own
attention. Families that do something else with keys and values than mlx-lm's shared attention
function fail in the middle of a text. Here the model made from the config is run lazily, over
packed caches: nothing is computed, and what fails, fails before weights are loaded.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache

from draftloom.kv_cache import GROUP_SIZES, KVQuantization
from draftloom.model_info import ModelInfo

from .base import make_skeleton

__all__ = ["why_not_quantized_kv"]


def why_not_quantized_kv(model: ModelInfo, settings: KVQuantization) -> str:
    """Why the caches of a model cannot be packed so; empty where they can.

    Raises:
        ModelError: mlx-lm does not know the model type, or the config lacks what its class needs.
    """
    skeleton, _ = make_skeleton(model)
    cache = make_prompt_cache(skeleton)
    if any(isinstance(entry, RotatingKVCache) for entry in cache):
        return "mlx-lm cannot pack its sliding-window caches"
    tokens = mx.zeros((1, 2), dtype=mx.int32)
    skeleton(tokens, cache=cache)
    if misfit := _misfit(cache, settings.kv_group_size):
        return misfit
    maybe_quantize_kv_cache(cache, 0, settings.kv_group_size, settings.kv_bits)
    if not any(isinstance(entry, QuantizedKVCache) for entry in cache):
        return "it has no cache that mlx-lm packs"
    try:
        for width in (1, 2):  # a block takes another way through masks than a single token
            skeleton(tokens[:, :width], cache=cache)
    except (AttributeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        return f"its attention does not take them: {_line(error)}"
    return ""


def _misfit(cache: list[Any], group_size: int) -> str:
    """Keys or values that cannot be cut into groups."""
    plain = [entry for entry in cache if hasattr(entry, "to_quantized")]
    sizes = {rows.shape[-1] for entry in plain for rows in (entry.keys, entry.values)}
    wrong = sorted(size for size in sizes if size % group_size)
    if not wrong:
        return ""
    others = [g for g in GROUP_SIZES if all(size % g == 0 for size in sizes)]
    advice = f"kv_group_size {others[-1]} does" if others else "no group size does"
    return f"kv_group_size {group_size} does not divide its head size {wrong[0]}, {advice}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
