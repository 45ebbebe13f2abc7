"""The operation written to be read, in float32."""

import mlx.core as mx
import mlx.nn as nn

from .placing import Heads

__all__ = ["place"]


def place(
    rows: mx.array, heads: Heads, norms: tuple[nn.RMSNorm, nn.RMSNorm], rope: nn.RoPE, offset: int
) -> tuple[mx.array, mx.array]:
    """Queries and keys of a packed product, normed head by head and rotated.

    Args:
        rows: [B, T, N].
        heads: where they lie in it.
        norms: of q and of k.
        rope: how they are rotated.
        offset: the position of the first token.

    Returns:
        [B, Hq, T, D] and [B, Hk, T, D] float32.
    """
    rows = rows.astype(mx.float32)
    end = heads.queries * heads.step
    starts = (
        [i * heads.step for i in range(heads.queries)],
        [end + i * heads.size for i in range(heads.keys)],
    )
    found = [
        mx.stack([_head(rows[..., at : at + heads.size], norm, rope, offset) for at in part], 1)
        for norm, part in zip(norms, starts, strict=True)
    ]
    return found[0], found[1]


def _head(x: mx.array, norm: nn.RMSNorm, rope: nn.RoPE, offset: int) -> mx.array:
    x = x / mx.sqrt((x * x).mean(axis=-1, keepdims=True) + norm.eps)
    x = x * norm.weight.astype(mx.float32)
    half = rope.dims // 2
    places = rope.scale * (offset + mx.arange(x.shape[1]).astype(mx.float32))[:, None]
    angle = places * rope.base ** (-mx.arange(half).astype(mx.float32) / half)
    first, second = slice(0, half), slice(half, rope.dims)
    if rope.traditional:
        first, second = slice(0, rope.dims, 2), slice(1, rope.dims, 2)
    a, b = x[..., first], x[..., second]
    turned = [a * mx.cos(angle) - b * mx.sin(angle), a * mx.sin(angle) + b * mx.cos(angle)]
    if rope.traditional:
        joined = mx.stack(turned, axis=-1).flatten(-2)
    else:
        joined = mx.concatenate(turned, axis=-1)
    return mx.concatenate([joined, x[..., rope.dims :]], axis=-1)
