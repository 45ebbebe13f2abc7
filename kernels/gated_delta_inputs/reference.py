"""The operation written to be read, in float32. Shapes as in :mod:`.layer`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .layer import Layer, Prepared, Projected

__all__ = ["prepare"]

EPS = 1e-6


def prepare(
    layer: Layer, projected: Projected, before: mx.array, mask: mx.array | None = None
) -> Prepared:
    """Convolve, squash, split, normalise, and make the gates.

    Args:
        layer: parameters and sizes.
        projected: of T tokens.
        before: [B, W, C], the W rows before them.
        mask: [B, T] bool or None; a token with False counts as zero in the convolution.

    Source: Gated Delta Networks (arXiv 2412.06464), section 3.4; gates as in Mamba-2.
    """
    conv: Any = layer.conv
    weight = conv.weight[..., 0].astype(mx.float32)
    qkv, a, b = (x.astype(mx.float32) for x in projected)
    if mask is not None:
        qkv = mx.where(mask[..., None], qkv, 0.0)
    window = mx.concatenate([before.astype(mx.float32), qkv], axis=1)
    tokens = qkv.shape[1]
    mixed = mx.zeros_like(qkv)
    for tap in range(weight.shape[1]):
        mixed = mixed + window[:, tap : tap + tokens] * weight[:, tap]
    mixed = mixed / (1 + mx.exp(-mixed))
    keys = layer.key_heads * layer.key_size
    q, k, v = mx.split(mixed, [keys, 2 * keys], axis=-1)
    q, k = (x.reshape(*x.shape[:2], layer.key_heads, layer.key_size) for x in (q, k))
    v = v.reshape(*v.shape[:2], layer.value_heads, layer.value_size)
    q, k = (x / mx.sqrt((x * x).sum(axis=-1, keepdims=True) + EPS) for x in (q, k))
    step = mx.logaddexp(a + layer.dt_bias.astype(mx.float32), mx.array(0.0))
    g = mx.exp(-mx.exp(layer.a_log.astype(mx.float32)) * step)
    return Prepared(q * layer.key_size**-0.5, k, v, g, 1 / (1 + mx.exp(-b)), window)
