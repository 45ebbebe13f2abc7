"""Plans and launches the kernel of :mod:`.source` for one backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx

from draftloom.kernels.backend import Backend, KernelLauncher
from draftloom.kernels.head_norm import HeadNormRequest

from .placing import Heads, Rotation
from .source import Variant

__all__ = ["Launcher", "Request", "unsupported"]


class Request(HeadNormRequest):
    """What a call asks of a kernel. It is plain if both norms have a weight and the same epsilon,
    and positions a base and a scale, and nothing else."""


def unsupported(request: Request) -> str | None:
    """Why the kernel body cannot serve a request, or None if it can."""
    plain = "norms that are not two plain RMS norms, or other rotary positions than plain ones"
    return request.why_not("D", plain)


@attrs.frozen(cache_hash=True)
class _Form:
    """What differs between launches, besides shapes."""

    heads: Heads
    dims: int
    traditional: bool
    eps: float


@lru_cache(maxsize=512)
def _plan(
    backend: Backend, form: _Form, dtypes: tuple[mx.Dtype, ...], shape: tuple[int, ...]
) -> tuple[Callable[..., list[mx.array]], dict[str, Any]]:
    """What is the same in every launch on equal shapes and dtypes."""
    rows, tokens, _ = shape
    heads, dtype = form.heads, dtypes[0]
    count = heads.queries + heads.keys
    simds = next(n for n in (4, 2, 1) if count % n == 0)
    template = [
        ("QT", dtype), ("Hq", heads.queries), ("Hk", heads.keys), ("D", heads.size),
        ("STEP", heads.step), ("R", form.dims), ("TRADITIONAL", int(form.traditional)),
        ("SIMDS", simds),
    ]  # fmt: skip
    return backend.kernel(Variant(form.eps), dtypes, template), {
        "template": template,
        "grid": (32 * rows * tokens, count, 1),
        "threadgroup": (32, simds, 1),
        "output_shapes": [(rows, n, tokens, heads.size) for n in (heads.queries, heads.keys)],
        "output_dtypes": [dtype, dtype],
    }


@attrs.frozen
class Launcher(KernelLauncher):
    """The operation on one backend."""

    def place(
        self, rows: mx.array, heads: Heads, norms: tuple[Any, Any], rotation: Rotation
    ) -> tuple[mx.array, mx.array]:
        """As :func:`..dispatch.place`, in one launch; the rotation's table is made once."""
        table = rotation.table(rows.shape[1])
        inputs = [rows, norms[0].weight, norms[1].weight, table]
        dtypes = tuple([x.dtype for x in inputs])
        rope = rotation.rope
        form = _Form(heads, rope.dims, bool(rope.traditional), float(norms[0].eps))
        kernel, arguments = _plan(self.backend, form, dtypes, rows.shape)
        queries, keys = kernel(inputs=inputs, **arguments, **self.fill)
        return queries, keys
