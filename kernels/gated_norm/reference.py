"""The operation written to be read, in float32."""

import mlx.core as mx

__all__ = ["normalise"]


def normalise(y: mx.array, z: mx.array, weight: mx.array, eps: float) -> mx.array:
    """RMS norm of every head of y, times its gate.

    Args:
        y: [B, T, Hv, Dv].
        z: [B, T, Hv, Dv], the gates before SiLU.
        weight: [Dv].
        eps: added to the mean square.

    Returns:
        [B, T, Hv, Dv] float32.
    """
    y, z, weight = (x.astype(mx.float32) for x in (y, z, weight))
    normed = y / mx.sqrt((y * y).mean(axis=-1, keepdims=True) + eps) * weight
    return normed * z / (1 + mx.exp(-z))
