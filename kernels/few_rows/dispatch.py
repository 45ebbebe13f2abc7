"""Runs the operation by the implementation that serves a call."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx

from draftloom.device import on_gpu
from draftloom.kernels.choice import Operation

from . import array
from .gpu import TIMED, cuda
from .launch import MOST_ROWS, Request

__all__ = ["OPERATION", "product"]

OPERATION = Operation("few-rows", array, {"cuda": cuda}, TIMED)


def product(x: mx.array, weight: mx.array, *, use: Any = None) -> mx.array:
    """x by the rows of a matrix.

    Args:
        x: [..., D]. A kernel takes 2 to 32 rows in all; one row and more of them are MLX's own.
        weight: [N, D].
        use: as `draftloom.kernels.choice.Operation.choose`.

    Returns:
        [..., N] in x's dtype.
    """
    rows = x.size // x.shape[-1]
    if not 1 < rows <= MOST_ROWS or weight.ndim != 2 or x.dtype != weight.dtype:
        return array.product(x, weight)
    run = _served(rows, weight.shape, x.dtype, on_gpu(), use)
    found: mx.array = run(x, weight)
    return found


@lru_cache(maxsize=1024)
def _served(rows: int, shape: tuple[int, ...], dtype: mx.Dtype, gpu: bool, use: Any) -> Any:
    request = Request(dtype, rows, shape[0], shape[1], "gpu" if gpu else "cpu")
    return OPERATION.choose(request, use).implementation.product
