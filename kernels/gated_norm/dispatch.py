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

__all__ = ["OPERATION", "normalise"]

OPERATION = Operation("gated-norm", array, {"metal": metal, "cuda": cuda}, TIMED)


def normalise(norm: Any, y: mx.array, z: mx.array, *, use: Any = None) -> mx.array:
    """RMS norm of every head of y, times SiLU of its gate.

    Args:
        norm: the layer's module: ``weight`` [Dv] and ``eps``, called with y and z.
        y: [B, T, Hv, Dv].
        z: [B, T, Hv, Dv], the gates before SiLU.
        use: as `draftloom.kernels.choice.Operation.choose`.

    Returns:
        [B, T, Hv, Dv] in y's dtype.
    """
    if OPERATION.wanted(use) is None:
        return array.normalise(norm, y, z)
    device = "gpu" if on_gpu() else "cpu"
    plain = isinstance(norm, nn.Module) and list(norm) == ["weight"] and hasattr(norm, "eps")
    request = Request(y.dtype, y.shape[-1], plain, device)
    output: mx.array = OPERATION.choose(request, use).implementation.normalise(norm, y, z)
    return output
