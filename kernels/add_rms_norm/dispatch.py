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

__all__ = ["MOST_ROWS", "OPERATION", "add_norm"]

OPERATION = Operation("add-rms-norm", array, {"metal": metal, "cuda": cuda}, TIMED)
MOST_ROWS = 32
"""More, as a prompt has, are MLX's own: there a launch is not what counts."""


def add_norm(x: mx.array, y: mx.array, norm: Any, *, use: Any = None) -> tuple[mx.array, mx.array]:
    """The sum of two arrays, and its norm.

    Args:
        x: [B, T, D].
        y: [B, T, D].
        norm: a module; one with a ``weight`` [D] and ``eps`` where a kernel is to run it.
        use: as `draftloom.kernels.choice.Operation.choose`.

    Returns:
        x + y and norm(x + y), both [B, T, D].
    """
    rows, tokens, size = x.shape
    if rows * tokens > MOST_ROWS or OPERATION.wanted(use) is None:
        return array.add_norm(x, y, norm)
    plain = type(norm) is nn.RMSNorm and x.dtype == y.dtype == norm.weight.dtype
    request = Request(x.dtype, size, plain, "gpu" if on_gpu() else "cpu")
    implementation = OPERATION.choose(request, use).implementation
    found: tuple[mx.array, mx.array] = implementation.add_norm(x, y, norm)
    return found
