"""What of the device decides between two ways of doing the same."""

from __future__ import annotations

import mlx.core as mx

__all__ = ["on_cuda"]


def on_cuda() -> bool:
    """Whether arrays are computed by MLX-CUDA here."""
    return mx.default_device() == mx.Device(mx.gpu) and mx.cuda.is_available()
