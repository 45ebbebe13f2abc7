"""What of the device decides between two ways of doing the same."""

from __future__ import annotations

import mlx.core as mx

__all__ = ["backend_name", "on_cuda", "on_gpu"]


def backend_name() -> str:
    """The backend that MLX has: ``metal``, ``cuda`` or ``cpu``, whatever the default device."""
    return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu"


def on_gpu() -> bool:
    """Whether arrays are computed by a GPU here."""
    on: bool = mx.default_device() == mx.Device(mx.gpu)
    return on


def on_cuda() -> bool:
    """Whether arrays are computed by MLX-CUDA here."""
    return on_gpu() and mx.cuda.is_available()
