"""Verify attention, written to be read: float32, one head and one query at a time in meaning.

What every other module of this package is measured against. Shapes, here and in the other modules:
B rows, Hq query heads, Hkv key heads (Hq a multiple), M query tokens, N allocated keys, D the size
of a head.
"""

from __future__ import annotations

import mlx.core as mx

__all__ = ["attend", "visible"]


def visible(lengths: mx.array, queries: int, allocated: int, window: int | None) -> mx.array:
    """Which keys each query sees: [B, M, N] bool.

    The queries are the last M of a row's valid keys; a query sees itself and what is before it,
    the last ``window`` of that if there is one.

    Args:
        lengths: [B] int32, valid keys of each row, the M of the block among them.
        queries: M.
        allocated: N.
        window: keys a query sees at most, or None.
    """
    position = lengths[:, None] - queries + mx.arange(queries)
    key = mx.arange(allocated)
    seen = (key <= position[..., None]) & (key < lengths[:, None, None])
    return seen if window is None else seen & (position[..., None] < key + window)


def attend(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    lengths: mx.array,
    *,
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale q k^T over the visible keys and the sink) v, in float32.

    Args:
        q: [B, Hq, M, D].
        keys: [B, Hkv, N, D]; what lies past a row's length is not looked at.
        values: [B, Hkv, N, D].
        lengths: [B] int32.
        scale: factor on the scores.
        window: keys a query sees at most, or None.
        sinks: [Hq] one logit more a head, which takes weight and gives nothing; or None.

    Returns:
        [B, Hq, M, D] float32; zero for a query that sees no key.
    """
    rows, heads, queries, size = q.shape
    key_heads, allocated = keys.shape[1:3]
    valid = (mx.arange(allocated) < lengths[:, None])[:, None, :, None]
    keys, values = (
        mx.where(valid, x, mx.array(0, x.dtype)).astype(mx.float32) for x in (keys, values)
    )
    q = q.astype(mx.float32).reshape(rows, key_heads, heads // key_heads, queries, size)
    scores = scale * (q @ keys[:, :, None].swapaxes(-1, -2))
    seen = visible(lengths, queries, allocated, window)[:, None, None]
    scores = mx.where(seen, scores, -mx.inf)
    sink = mx.full((heads,), -mx.inf) if sinks is None else sinks.astype(mx.float32)
    sink = sink.reshape(key_heads, heads // key_heads, 1, 1)
    top = mx.maximum(scores.max(axis=-1, keepdims=True), sink)
    top = mx.where(top == -mx.inf, 0.0, top)
    weights = mx.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + mx.exp(sink - top)
    out = (weights @ values[:, :, None]) / mx.where(total == 0, 1.0, total)
    return out.reshape(rows, heads, queries, size)
