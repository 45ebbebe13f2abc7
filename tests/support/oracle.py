"""Plain mlx-lm: its greedy text, and its caches after every token of a text.

The caches of a fresh prefill are taken from one run of the stock model, token by token: in
float32 on the CPU every row of a product is bit-equal for any number of rows, so that this run
holds the prefill of every prefix, however it is cut into chunks (`test_support` checks it).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from tests.support import models

__all__ = [
    "Trace",
    "by_hand",
    "greedy",
    "greedy_trace",
    "prefill",
    "same_caches",
    "text_model",
    "trace",
]


def text_model(model: nn.Module) -> Any:
    """What has `args`, `model.layers` and the head."""
    return getattr(model, "language_model", model)


def greedy(model: nn.Module, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The tokens of mlx-lm's own `generate_step` at temperature 0."""
    stream = mx.default_stream(mx.cpu)
    steps = generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens, stream=stream)
    return [int(token) for token, _ in steps]


def prefill(model: nn.Module, tokens: Sequence[int], chunk: int = 2048) -> list[Any]:
    """Fresh caches after tokens, run in chunks."""
    cache = make_prompt_cache(model)
    for start in range(0, len(tokens), chunk):
        model(mx.array([list(tokens[start : start + chunk])]), cache=cache)
    mx.eval([entry.state for entry in cache])
    return cache


def by_hand(model: nn.Module, tokens: mx.array, cache: list[Any]) -> list[mx.array]:
    """Run the stock layers one by one.

    Args:
        model: not wrapped by an adapter, and without factors of its own around the layers.
        tokens: [B, T].
        cache: its caches.

    Returns:
        The embeddings, the outputs of every layer, the normed hidden states, the logits.
    """
    text = text_model(model)
    hidden = text.model.embed_tokens(tokens)
    masks = [create_attention_mask(hidden, e) if isinstance(e, KVCache) else None for e in cache]
    outputs = [hidden]
    for layer, entry, mask in zip(text.model.layers, cache, masks, strict=True):
        hidden = layer(hidden, mask, cache=entry)
        outputs.append(hidden)
    outputs.append(text.model.norm(hidden))
    tied = text.args.tie_word_embeddings
    head = text.model.embed_tokens.as_linear if tied else text.lm_head
    return [*outputs, head(outputs[-1])]


@attrs.frozen(eq=False)
class Trace:
    """What the stock model held after every token of a text.

    Attributes:
        tokens: the text.
        logits: [n, V], row i after i + 1 tokens.
        features: by layer [n, D], outputs of the layers.
        entries: by layer: keys and values [B, H, n, size] of an attention layer, or by number of
            tokens (0..n) the slots of a recurrent one.
    """

    tokens: tuple[int, ...]
    logits: np.ndarray
    features: list[np.ndarray]
    entries: list[Any]

    def differences(self, cache: list[Any], count: int) -> list[str]:
        """Where caches differ, bit for bit, from those after the first `count` tokens."""
        found = []
        if len(cache) != len(self.entries):
            return [f"{len(cache)} caches, not {len(self.entries)}"]
        for layer, (entry, expected) in enumerate(zip(cache, self.entries, strict=True)):
            if isinstance(entry, KVCache):
                found += _kv_differences(layer, entry, expected, count)
            else:
                found += _slot_differences(layer, entry.cache, expected[count])
        return found

    def taps(self, layers: Sequence[int], count: int) -> np.ndarray:
        """Features [count, F] of the first tokens, as an adapter tapping these layers gives."""
        return np.concatenate([self.features[layer][:count] for layer in layers], axis=-1)


def _kv_differences(layer: int, entry: KVCache, expected: Any, count: int) -> list[str]:
    if entry.offset != count:
        return [f"layer {layer} ends at {entry.offset}, not {count}"]
    if not count:
        return []
    return [
        f"layer {layer}: {name} differ"
        for name, ours, theirs in zip(
            ("keys", "values"), entry.keys_and_values(), expected, strict=True
        )
        if not np.array_equal(_array(ours), theirs[:, :, :count])
    ]


def _slot_differences(layer: int, slots: Any, expected: Any) -> list[str]:
    if not isinstance(slots, list) or len(slots) != len(expected):
        return [f"layer {layer}: slots {type(slots)}"]
    return [
        f"layer {layer}: slot {i} differs"
        for i, (ours, theirs) in enumerate(zip(slots, expected, strict=True))
        if not _same(ours, theirs)
    ]


def _array(value: mx.array) -> np.ndarray:
    """In NumPy, which has no bfloat16."""
    return np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)


def _same(ours: Any, theirs: np.ndarray | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    array = _array(ours)
    return array.dtype == theirs.dtype and np.array_equal(array, theirs)


def trace(model: nn.Module, rows: Sequence[Sequence[int]]) -> Trace:
    """Run texts of one length through the stock model, token by token.

    Args:
        model: not wrapped by an adapter.
        rows: [B, n]; logits and features are those of row 0.
    """
    cache = make_prompt_cache(model)
    slots: list[list[Any]] = [[_slots(entry)] for entry in cache]
    outputs = []
    for column in zip(*rows, strict=True):
        outputs.append(by_hand(model, mx.array(column)[:, None], cache))
        for seen, entry in zip(slots, cache, strict=True):
            seen.append(_slots(entry))
    mx.eval(outputs)
    _, *features, _, logits = (
        _array(mx.concatenate(part, axis=1))[0] for part in zip(*outputs, strict=True)
    )
    entries = [
        [_array(a) for a in entry.keys_and_values()]
        if isinstance(entry, KVCache)
        else [_numpy(values) for values in seen]
        for entry, seen in zip(cache, slots, strict=True)
    ]
    return Trace(tuple(rows[0]), logits, features, entries)


def _slots(entry: Any) -> list[Any] | None:
    return list(entry.cache) if isinstance(entry, ArraysCache) else None


def _numpy(values: list[Any]) -> list[np.ndarray | None]:
    return [None if value is None else _array(value) for value in values]


@lru_cache(maxsize=512)
def greedy_trace(name: str, prompt: tuple[int, ...], max_tokens: int) -> Trace:
    """The trace of a prompt and its greedy continuation, by mlx-lm's own `generate_step`."""
    model = models.stock(name)
    return trace(model, [[*prompt, *greedy(model, prompt, max_tokens)]])


def same_caches(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether two lists of caches hold the same, bit for bit."""
    for a, b in zip(ours, theirs, strict=True):
        if type(a) is not type(b):
            return False
        if isinstance(a, KVCache):
            if a.offset != b.offset:
                return False
            if a.offset and not all(
                np.array_equal(np.array(x), np.array(y))
                for x, y in zip(a.keys_and_values(), b.keys_and_values(), strict=True)
            ):
                return False
        elif not all(
            _same(x, None if y is None else np.array(y))
            for x, y in zip(a.cache, b.cache, strict=True)
        ):
            return False
    return True
