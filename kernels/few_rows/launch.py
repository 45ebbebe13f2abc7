"""Plans and launches the kernel of :mod:`.source` for one backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx

from draftloom.kernels.backend import Backend, KernelLauncher

from .source import Product

__all__ = ["MOST_ROWS", "Geometry", "Launcher", "Request", "geometry_for", "unsupported"]

MOST_ROWS = 32
"""Most rows of x."""
_KINDS = {mx.float16: 1, mx.bfloat16: 2}


@attrs.frozen
class Request:
    """What a call asks of a kernel.

    Attributes:
        dtype: of x and the matrix.
        rows: of x, in all.
        outputs: rows of the matrix, N.
        size: D.
        device: "cpu" or "gpu", the default device.
    """

    dtype: mx.Dtype
    rows: int
    outputs: int
    size: int
    device: str


def unsupported(request: Request) -> str | None:
    """Why the kernel body cannot serve a request, or None if it can."""
    if request.dtype not in _KINDS:
        return f"dtype {request.dtype}: the kernel takes float16 and bfloat16"
    if not 1 <= request.rows <= MOST_ROWS:
        return f"{request.rows} rows: the kernel takes 1 to {MOST_ROWS}"
    if request.size % 32:
        return f"D = {request.size}: the kernel needs a multiple of 32"
    if request.outputs % 16:
        return f"N = {request.outputs}: the kernel needs a multiple of 16"
    return None


@attrs.frozen(cache_hash=True)
class Geometry:
    """How the work is spread over threads.

    Attributes:
        tiles: a threadgroup gives 16 times as many outputs.
        simds: simdgroups in a threadgroup, which share out the columns of the matrix.
        unroll: chunks of 32 columns that a simdgroup has on their way at once.
    """

    tiles: int
    simds: int
    unroll: int


def geometry_for(outputs: int) -> Geometry:
    """The geometry for so many outputs: of seven, the fastest on an H100 for 2,560 of them (of
    4,096 and of 9,216 columns)."""
    return Geometry(1 if outputs % 32 else 2, 8, 4)


@lru_cache(maxsize=1024)
def _plan(
    backend: Backend,
    geometry: Geometry | None,
    dtype: mx.Dtype,
    tiles: int,
    dimensions: int,
    shape: tuple[int, ...],
) -> tuple[Callable[..., list[mx.array]], dict[str, Any]]:
    """What is the same in every launch on equal shapes and dtypes."""
    outputs, _ = shape
    geometry = geometry or geometry_for(outputs)
    template = [
        ("CT", dtype),
        ("KIND", _KINDS[dtype]),
        ("MT", tiles),
        ("RT", geometry.tiles),
        ("SIMDS", geometry.simds),
        ("AHEAD", geometry.unroll),
    ]
    return backend.kernel(Product(dimensions), (dtype, dtype), template), {
        "template": template,
        "grid": (32 * (outputs // (16 * geometry.tiles)), geometry.simds, 1),
        "threadgroup": (32, geometry.simds, 1),
        "output_dtypes": [dtype],
    }


@attrs.frozen
class Launcher(KernelLauncher):
    """The operation on one backend.

    Attributes:
        geometry: a fixed geometry, or None for :func:`geometry_for`.
    """

    geometry: Geometry | None = None

    def product(self, x: mx.array, weight: mx.array) -> mx.array:
        """As :func:`..dispatch.product`, in one launch."""
        *leading, size = x.shape
        kernel, arguments = _plan(
            self.backend, self.geometry, x.dtype, (x.size // size + 7) // 8, x.ndim, weight.shape
        )
        shapes = [(*leading, weight.shape[0])]
        return kernel(inputs=[x, weight], output_shapes=shapes, **arguments, **self.fill)[0]
