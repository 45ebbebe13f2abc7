"""Runs the operation by the implementation that serves a call."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.device import on_gpu
from draftloom.kernels.choice import Operation

from . import array
from .gpu import TIMED, cuda, metal
from .launch import Request
from .placing import Heads, Rotation

__all__ = ["OPERATION", "place"]

OPERATION = Operation("qk-norm-rope", array, {"metal": metal, "cuda": cuda}, TIMED)


def place(
    rows: mx.array,
    heads: Heads,
    norms: tuple[Any, Any],
    rotation: Rotation,
    *,
    use: Any = None,
) -> tuple[mx.array, mx.array]:
    """Queries and keys as attention takes them: normed head by head, and rotated.

    Args:
        rows: [B, T, N], a packed product.
        heads: where they lie in it.
        norms: the modules of q and of k: ``weight`` [D] and ``eps``.
        rotation: the positions; all rows of the batch have the same.
        use: as `draftloom.kernels.choice.Operation.choose`.

    Returns:
        [B, Hq, T, D] and [B, Hk, T, D] in the product's dtype.
    """
    if OPERATION.wanted(use) is None:
        return array.place(rows, heads, norms, rotation)
    plain = rotation.plain and all(type(norm) is nn.RMSNorm for norm in norms)
    plain = plain and norms[0].eps == norms[1].eps
    request = Request(rows.dtype, heads.size, plain, "gpu" if on_gpu() else "cpu")
    implementation = OPERATION.choose(request, use).implementation
    found: tuple[mx.array, mx.array] = implementation.place(rows, heads, norms, rotation)
    return found
