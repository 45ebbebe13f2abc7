"""Array code in mlx-lm's own order of operations: on the CPU bit-equal to its layers.

Shapes as in :mod:`.layer`.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gated_delta import compute_g, normalize_qk

from draftloom.kernels.check import Check
from draftloom.kernels.gated_delta.targets import why_not_for

from .layer import Layer, Prepared, Projected

__all__ = ["STOCK", "by_default", "checks", "prepare", "why_not_for"]

STOCK = True


def by_default() -> bool:
    """Whether `auto` runs this here: wherever no kernel does."""
    from .dispatch import OPERATION

    return OPERATION.default() == "array"


def checks() -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of("array")


def prepare(
    layer: Layer, projected: Projected, before: mx.array | None, mask: mx.array | None = None
) -> Prepared:
    """As :func:`..dispatch.prepare`."""
    qkv, a, b = projected
    rows, tokens, channels = qkv.shape
    if before is None:
        kept = layer.conv.weight.shape[1] - 1
        before = mx.zeros((rows, kept, channels), dtype=qkv.dtype)
    if mask is not None:
        qkv = mx.where(mask[..., None], qkv, 0)
    window = mx.concatenate([before, qkv], axis=1)
    mixed = nn.silu(layer.conv(window))
    size = layer.key_heads * layer.key_size
    q, k, v = mx.split(mixed, [size, 2 * size], -1)
    q = q.reshape(rows, tokens, layer.key_heads, layer.key_size)
    k = k.reshape(rows, tokens, layer.key_heads, layer.key_size)
    v = v.reshape(rows, tokens, layer.value_heads, layer.value_size)
    q, k = normalize_qk(q, k, inv_scale=layer.key_size**-0.5, eps=1e-6)
    g = compute_g(layer.a_log, a, layer.dt_bias)
    return Prepared(q, k, v, g, mx.sigmoid(b), window)
