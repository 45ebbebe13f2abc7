"""Plain mlx-lm over quantized caches, and models whose heads are wide enough to be packed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from draftloom.kv_cache import KVQuantization
from tests.support import models

__all__ = ["FAMILIES", "build", "differences", "plain", "stock"]

FAMILIES = ("qwen3_5-v2", "qwen3_5-tied", "qwen3_next", "qwen3", "llama", "qwen3_moe")
"""Hybrids and attention families of `models`; with heads of 32 numbers, one group."""


@lru_cache(maxsize=16)
def stock(name: str) -> nn.Module:
    """A model that nothing wraps."""
    return models.new(models.FAMILIES[name], head_dim=32)


@lru_cache(maxsize=16)
def build(name: str) -> nn.Module:
    """A second one with the same weights, for adapters to wrap."""
    return models.new(models.FAMILIES[name], head_dim=32)


def plain(
    model: nn.Module,
    prompt: Sequence[int],
    max_tokens: int,
    settings: KVQuantization | None,
    *,
    chunk: int = 2048,
    cache: list[Any] | None = None,
) -> tuple[list[int], list[Any]]:
    """mlx-lm's own `generate_step` at temperature 0: its tokens, and its caches, which then hold
    all of them."""
    cache = make_prompt_cache(model) if cache is None else cache
    steps = generate_step(
        mx.array(list(prompt)),
        model,
        mx.default_stream(mx.cpu),
        max_tokens=max_tokens,
        prompt_cache=cache,
        prefill_step_size=chunk,
        **({} if settings is None else attrs.asdict(settings)),
    )
    return [int(token) for token, _ in steps], cache


def differences(ours: list[Any], theirs: list[Any]) -> list[str]:
    """Where two lists of caches differ, bit for bit."""
    found = []
    for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if type(a) is not type(b):
            found.append(f"layer {layer} is a {type(a).__name__}, not a {type(b).__name__}")
        elif isinstance(a, KVCache | QuantizedKVCache) and a.offset != b.offset:
            found.append(f"layer {layer} ends at {a.offset}, not {b.offset}")
        elif not all(
            np.array_equal(np.array(x), np.array(y))
            for x, y in zip(_arrays(a), _arrays(b), strict=True)
        ):
            found.append(f"layer {layer} differs")
    return found


def _arrays(entry: Any) -> list[mx.array]:
    held = entry.keys_and_values() if hasattr(entry, "keys_and_values") else entry.cache
    return [array for _, array in tree_flatten(held)]
