"""The operation written to be read, in float32."""

import mlx.core as mx
import mlx.nn as nn

__all__ = ["add_norm"]


def add_norm(x: mx.array, y: mx.array, norm: nn.RMSNorm) -> tuple[mx.array, mx.array]:
    """x + y, rounded to their type as a model keeps it, and its RMS norm.

    Args:
        x: [..., D].
        y: [..., D], of the same dtype.
        norm: ``weight`` [D] and ``eps``.

    Returns:
        Both [..., D] float32.
    """
    total = (x + y).astype(mx.float32)
    scale = mx.rsqrt((total * total).mean(axis=-1, keepdims=True) + norm.eps)
    return total, total * scale * norm.weight.astype(mx.float32)
