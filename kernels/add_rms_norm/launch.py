"""Plans and launches the kernel of :mod:`.source` for one backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx

from draftloom.kernels.backend import Backend, KernelLauncher
from draftloom.kernels.rms_norm import FLOATS

from .source import Variant

__all__ = ["MOST_COLUMNS", "Launcher", "Request", "unsupported"]

_MOST_SIMDS = 16
_MOST_A_LANE = 32
MOST_COLUMNS = 32 * _MOST_SIMDS * _MOST_A_LANE
"""D at most: a lane keeps its numbers in registers."""


@attrs.frozen
class Request:
    """What a call asks of a kernel.

    Attributes:
        dtype: of what is added.
        size: D.
        plain: whether the norm is an RMS norm with a weight, and all arrays have one dtype.
        device: "cpu" or "gpu", the default device.
    """

    dtype: mx.Dtype
    size: int
    plain: bool
    device: str


def unsupported(request: Request) -> str | None:
    """Why the kernel body cannot serve a request, or None if it can."""
    if not 1 <= request.size <= MOST_COLUMNS:
        return f"D = {request.size}: the kernel takes up to {MOST_COLUMNS}"
    if request.dtype not in FLOATS:
        return f"dtype {request.dtype}: the kernel takes float32, float16 and bfloat16"
    if not request.plain:
        return "the norm is not a plain RMS norm, or its weight has another type than what it norms"
    return None


@lru_cache(maxsize=512)
def _plan(
    backend: Backend, variant: Variant, dtypes: tuple[mx.Dtype, ...], shape: tuple[int, ...]
) -> tuple[Callable[..., list[mx.array]], dict[str, Any]]:
    """What is the same in every launch on equal shapes and dtypes."""
    rows, tokens, size = shape
    simds = min(_MOST_SIMDS, -(-size // 32))
    template = [("QT", dtypes[0]), ("D", size), ("SIMDS", simds)]
    return backend.kernel(variant, dtypes, template), {
        "template": template,
        "grid": (32 * rows * tokens, simds, 1),
        "threadgroup": (32, simds, 1),
        "output_shapes": [shape, shape],
        "output_dtypes": [dtypes[0], dtypes[0]],
    }


@attrs.frozen
class Launcher(KernelLauncher):
    """The operation on one backend."""

    def add_norm(self, x: mx.array, y: mx.array, norm: Any) -> tuple[mx.array, mx.array]:
        """As :func:`..dispatch.add_norm`, in one launch."""
        inputs = [x, y, norm.weight]
        dtypes = tuple([one.dtype for one in inputs])
        kernel, arguments = _plan(self.backend, Variant(float(norm.eps)), dtypes, x.shape)
        total, normed = kernel(inputs=inputs, **arguments, **self.fill)
        return total, normed
