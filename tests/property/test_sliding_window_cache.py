"""Rotating caches: drawn blocks, commits and aborts against the rows of a text.

What a cache may still show, in temporal order, must be the text's own rows and nothing of what
was taken back; what an update shows must be what mlx-lm's own cache shows, whatever the order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache

from draftloom.caches.sliding_window import SlidingWindowRollback
from draftloom.errors import UsageError
from tests.support.profile import examples

HEADS, SIZE = 2, 4
LENGTH = 90
CUTS = ("block", "sequential", "split")


@lru_cache(maxsize=1)
def rows() -> tuple[mx.array, mx.array]:
    """Keys and values of a text [1, H, n, D]."""
    rng = np.random.default_rng(1)
    shape = (1, HEADS, LENGTH, SIZE)
    keys, values = (mx.array(rng.standard_normal(shape).astype(np.float32)) for _ in range(2))
    return keys, values


def part(start: int, count: int) -> tuple[mx.array, mx.array]:
    keys, values = (a[:, :, start : start + count] for a in rows())
    return keys, values


def window(cache: RotatingKVCache) -> np.ndarray:
    """What may still be attended to, oldest first: keys and values side by side."""
    if not cache.offset:
        return np.zeros((1, HEADS, 0, 2 * SIZE))
    both = [np.array(cache._temporal_order(a)) for a in (cache.keys, cache.values)]
    ordered = np.concatenate(both, axis=-1)
    return ordered[:, :, ordered.shape[2] - min(cache.offset, cache.max_size - 1) :]


def expected(count: int, size: int) -> np.ndarray:
    both = np.concatenate([np.array(a) for a in rows()], axis=-1)
    return both[:, :, max(0, count - size + 1) : count]


def cut(how: str, tokens: int) -> list[int]:
    """Sizes of the passes that verify a block."""
    if how == "sequential":
        return [1] * tokens
    half = tokens // 2 if how == "split" else 0
    return [size for size in (half, tokens - half) if size]


def feed(entry: Any, pieces: list[int], start: int, agree: int) -> list[np.ndarray]:
    """Write a block in pieces, junk after `agree` tokens; what each showed its queries (keys)."""
    junk = (mx.arange(sum(pieces)) >= agree)[:, None] * 100
    keys, values = (a + junk for a in part(start, sum(pieces)))
    seen, at = [], 0
    for size in pieces:
        shown, _ = entry.update_and_fetch(keys[:, :, at : at + size], values[:, :, at : at + size])
        seen.append(np.array(shown))
        at += size
    return seen


def check_seen(seen: np.ndarray, size: int, start: int, upto: int, good: int) -> None:
    """The window before an update and its own rows, as a set, where they are the text's."""
    wanted = np.array(rows()[0])[:, :, max(0, start - size + 1) : upto]
    assert seen.shape == wanted.shape
    found = {tuple(row) for row in seen[0, 0].tolist()}
    count = wanted.shape[2] - max(0, upto - good)
    assert {tuple(row) for row in wanted[0, 0, : max(0, count)].tolist()} <= found
    assert len([row for row in found if row[0] > 50]) == min(max(0, upto - good), seen.shape[2])


def one_cycle(data: st.DataObject, cache: RotatingKVCache, position: int) -> int:
    """Verify a drawn block; returns how many tokens of it stay."""
    rollback, size = SlidingWindowRollback(), cache.max_size
    width = data.draw(st.integers(0, 15), "width")
    agree = data.draw(st.integers(1, width + 1), "tokens of the block that are the text's")
    keep = data.draw(st.integers(0, agree - 1), "keep")
    settle = data.draw(st.integers(0, keep), "settle")
    pieces = cut(data.draw(st.sampled_from(CUTS), "passes"), width + 1)
    block = mx.zeros((1, width + 1), dtype=mx.int32)
    if data.draw(st.booleans(), "abort first"):
        layer = rollback.begin(cache, block)
        feed(layer.entry, pieces[: data.draw(st.integers(0, len(pieces)))], position, agree)
        layer.abort()
        layer.abort()
        assert cache.offset == position
        assert np.array_equal(window(cache), expected(position, size))
    layer = rollback.begin(cache, block)
    at = position
    for shown, piece in zip(feed(layer.entry, pieces, position, agree), pieces, strict=True):
        check_seen(shown, size, at, at + piece, position + agree)
        at += piece
    for kept in (keep, settle):
        layer.commit((kept,))
        assert cache.offset == position + kept + 1
        assert np.array_equal(window(cache), expected(position + kept + 1, size))
    if data.draw(st.booleans(), "abort after commit"):
        layer.abort()
        assert np.array_equal(window(cache), expected(position, size))
        return 0
    return settle + 1


@examples(150)
@given(st.data())
def test_random_operations_against_the_text(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 12), "window")
    prompt = data.draw(st.integers(0, 30), "prompt")
    chunk = data.draw(st.integers(1, 12), "chunk")
    cache = RotatingKVCache(max_size=size)
    for start in range(0, prompt, chunk):
        cache.update_and_fetch(*part(start, min(chunk, prompt - start)))
    position = prompt
    for _ in range(data.draw(st.integers(1, 8), "cycles")):
        if position + 20 > LENGTH:
            break
        position += one_cycle(data, cache, position)
        assert np.array_equal(window(cache), expected(position, size))
        for _ in range(data.draw(st.integers(0, 3), "plain steps")):
            cache.update_and_fetch(*part(position, 1))
            position += 1
            assert np.array_equal(window(cache), expected(position, size))


def test_a_few_rows_are_kept_and_no_old_buffer() -> None:
    size, block = 64, 5
    cache, rollback = RotatingKVCache(max_size=size), SlidingWindowRollback()
    cache.update_and_fetch(*part(0, 80))
    for _ in range(4):
        layer = rollback.begin(cache, mx.zeros((1, block)))
        feed(layer.entry, [block], 20, 99)
        assert cache.keys.shape[2] <= size + block
        held = [value for x in (layer, layer.entry) for value in vars(x).values()]
        assert not [value for value in held if isinstance(value, mx.array)]
        layer.commit((1,))
    layer = rollback.begin(cache, mx.zeros((1, 1)))
    assert not [value for value in vars(layer).values() if isinstance(value, mx.array)]


def test_the_first_rows_of_a_cache_that_keeps_them_stay() -> None:
    """`keep` rows at the start never leave the window."""
    cache, rollback = RotatingKVCache(max_size=8, keep=2), SlidingWindowRollback()
    cache.update_and_fetch(*part(0, 12))
    position, text = 12, np.array(rows()[0])
    for width, kept in ((4, 1), (0, 0), (0, 0), (3, 3), (6, 0), (0, 0), (2, 1)):
        layer = rollback.begin(cache, mx.zeros((1, width + 1)))
        feed(layer.entry, [width + 1], position, kept + 1)
        layer.abort()
        layer = rollback.begin(cache, mx.zeros((1, width + 1)))
        feed(layer.entry, [width + 1], position, kept + 1)
        layer.commit((kept,))
        position += kept + 1
        ordered = np.array(cache._temporal_order(cache.keys))
        assert np.array_equal(ordered[:, :, :2], text[:, :, :2])
        assert np.array_equal(ordered[:, :, -5:], text[:, :, position - 5 : position])


def test_a_cache_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="KVCache"):
        SlidingWindowRollback().begin(KVCache(), mx.zeros((1, 2)))


@pytest.mark.parametrize("width", [1, 4])
def test_counts_that_differ_or_were_never_verified_are_refused(width: int) -> None:
    cache, rollback = RotatingKVCache(max_size=8), SlidingWindowRollback()
    cache.update_and_fetch(*part(0, 12))
    layer = rollback.begin(cache, mx.zeros((1, width)))
    with pytest.raises(ValueError, match="ends at 12"):
        layer.commit((0,))
    with pytest.raises(ValueError, match="different counts"):
        layer.commit((0, 1))
    layer.abort()
    assert np.array_equal(window(cache), expected(12, 8))


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("offset", [0, 3, 7, 8, 20])
@pytest.mark.parametrize("narrow", [None, 8, 5])
def test_masks_are_those_of_the_rows_that_are_shown(
    offset: int, tokens: int, narrow: int | None
) -> None:
    """Against the definition: a query sees the newest tokens up to itself."""
    size = 8
    cache = RotatingKVCache(max_size=size)
    if offset:
        cache.update_and_fetch(*part(0, offset))
    entry = SlidingWindowRollback().begin(cache, mx.zeros((1, 5))).entry
    mask = entry.make_mask(tokens, window_size=narrow, return_array=True)
    (seen,) = feed(entry, [tokens], offset, 999)
    query = offset + np.arange(tokens)[:, None]
    key = offset + tokens - seen.shape[2] + np.arange(seen.shape[2])[None]
    wanted = (key <= query) & (query < key + (narrow or size))
    found = np.ones_like(wanted) if mask is None else np.array(mask).reshape(wanted.shape)
    assert np.array_equal(found, wanted)
