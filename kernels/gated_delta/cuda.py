"""The kernels on CUDA (MLX-CUDA on Linux)."""

import mlx.core as mx

from .launch import Backend, Launcher, Request, unsupported_shape
from .source import CUDA_PRELUDE

__all__ = ["BACKEND", "LAUNCHER", "supports", "why_not_here"]

BACKEND = Backend("cuda", mx.fast.cuda_kernel, CUDA_PRELUDE, memory=48 * 1024)
LAUNCHER = Launcher(BACKEND)


def why_not_here() -> str | None:
    """None if the kernels can run on the default device, else the reason why not."""
    if not mx.cuda.is_available():
        return "MLX was built without CUDA or finds no CUDA device"
    if mx.default_device() == mx.Device(mx.cpu):
        return "the default device is the CPU"
    return None


def supports(request: Request) -> str | None:
    """None if these kernels can serve the request here, else the reason why not."""
    if not mx.cuda.is_available():
        return "MLX was built without CUDA or finds no CUDA device"
    if request.device != "gpu":
        return "the default device is the CPU"
    return unsupported_shape(request)
