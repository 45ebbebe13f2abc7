"""Plans and launches the kernel of :mod:`.source` for one backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx

from draftloom.kernels.backend import Backend, KernelLauncher
from draftloom.kernels.head_norm import HeadNormRequest

from .source import Variant

__all__ = ["Launcher", "Request", "unsupported"]


class Request(HeadNormRequest):
    """What a call asks of a kernel. It is plain if the norm has a weight and an epsilon, and
    nothing else."""


def unsupported(request: Request) -> str | None:
    """Why the kernel body cannot serve a request, or None if it can."""
    plain = "the layer's norm is not an RMS norm with a weight and an epsilon"
    return request.why_not("Dv", plain)


@lru_cache(maxsize=512)
def _plan(
    backend: Backend, variant: Variant, dtypes: tuple[mx.Dtype, ...], shape: tuple[int, ...]
) -> tuple[Callable[..., list[mx.array]], dict[str, Any]]:
    """What is the same in every launch on equal shapes and dtypes."""
    rows, tokens, heads, size = shape
    simds = next(n for n in (4, 2, 1) if heads % n == 0)
    template = [("QT", dtypes[0]), ("Hv", heads), ("Dv", size), ("SIMDS", simds)]
    return backend.kernel(variant, dtypes, template, strided=True), {
        "template": template,
        "grid": (32 * rows * tokens, heads, 1),
        "threadgroup": (32, simds, 1),
        "output_shapes": [shape],
        "output_dtypes": [dtypes[0]],
    }


@attrs.frozen
class Launcher(KernelLauncher):
    """The operation on one backend."""

    def normalise(self, norm: Any, y: mx.array, z: mx.array) -> mx.array:
        """As :func:`..dispatch.normalise`, in one launch."""
        inputs = [y, z, norm.weight]
        dtypes = tuple([x.dtype for x in inputs])
        kernel, arguments = _plan(self.backend, Variant(float(norm.eps)), dtypes, y.shape)
        return kernel(inputs=inputs, **arguments, **self.fill)[0]
