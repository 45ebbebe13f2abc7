"""Runs the operation by the implementation that serves a call."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from draftloom.device import on_gpu
from draftloom.kernels.choice import Operation

from . import array
from .gpu import TIMED, cuda, metal
from .launch import Request
from .layer import Layer, Prepared, Projected

__all__ = ["OPERATION", "Request", "prepare"]

OPERATION = Operation("gated-delta-inputs", array, {"metal": metal, "cuda": cuda}, TIMED)


def prepare(
    layer: Layer,
    projected: Projected,
    before: mx.array | None,
    mask: mx.array | None = None,
    *,
    use: Any = None,
) -> Prepared:
    """From projections to what the recurrence wants.

    Args:
        layer: parameters and sizes.
        projected: qkv [B, T, C], a and b [B, T, Hv].
        before: [B, W, C], the convolution's last W inputs; None is zeros.
        mask: [B, T] bool or None; a token with False counts as zero in the convolution.
        use: as `draftloom.kernels.choice.Operation.choose`.

    Returns:
        q, k, v, the gates, and the convolution's whole input.
    """
    if OPERATION.wanted(use) is None:
        return array.prepare(layer, projected, before, mask)
    conv: Any = layer.conv
    request = Request(
        dtype=projected.qkv.dtype,
        before=projected.qkv.dtype if before is None else before.dtype,
        taps=conv.weight.shape[1],
        biased="bias" in conv,
        key_heads=layer.key_heads,
        value_heads=layer.value_heads,
        key_size=layer.key_size,
        value_size=layer.value_size,
        device="gpu" if on_gpu() else "cpu",
    )
    run = OPERATION.choose(request, use).implementation.prepare
    prepared: Prepared = run(layer, projected, before, mask)
    return prepared
