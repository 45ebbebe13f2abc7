"""The kernels on Metal (macOS)."""

import mlx.core as mx

from .launch import Backend, Launcher, Request, unsupported_shape
from .source import METAL_PRELUDE

__all__ = ["BACKEND", "LAUNCHER", "supports", "why_not_here"]

BACKEND = Backend("metal", mx.fast.metal_kernel, METAL_PRELUDE)
LAUNCHER = Launcher(BACKEND)


def why_not_here() -> str | None:
    """None if the kernels can run on the default device, else the reason why not."""
    if not mx.metal.is_available():
        return "MLX was built without Metal or finds no Metal device"
    if mx.default_device() == mx.Device(mx.cpu):
        return "the default device is the CPU"
    return None


def supports(request: Request) -> str | None:
    """None if these kernels can serve the request here, else the reason why not."""
    if not mx.metal.is_available():
        return "MLX was built without Metal or finds no Metal device"
    if request.device != "gpu":
        return "the default device is the CPU"
    return unsupported_shape(request)
