"""Verify attention by MLX's own ``mx.fast.scaled_dot_product_attention``: any device, any shape.

With one length for all rows, on the CPU, the valid keys are cut out and the call is mlx-lm's own:
bit-equal to it. Elsewhere keys are taken at their allocated length with a mask, so that MLX-CUDA
plans nothing anew. (Values past a length must then be finite: they get weight 0.)
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from draftloom.kernels.check import Check

from .reference import visible
from .targets import why_not_for

__all__ = ["STOCK", "attend", "by_default", "checks", "supports", "why_not_for"]

STOCK = True


def by_default() -> bool:
    """Whether `auto` runs MLX's own attention here: unless a kernel has been timed."""
    from . import cuda, metal

    return not (metal.by_default() or cuda.by_default())


def checks() -> Iterator[Check]:
    """The parity checks, on the default device."""
    from .checks import checks_of

    return checks_of("array")


def supports(request: object) -> str | None:
    """None: it serves every request."""
    return None


def attend(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    lengths: int | mx.array,
    *,
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Arguments as :func:`..dispatch.attend`.

    Returns:
        [B, Hq, M, D] in q's dtype.
    """
    queries = q.shape[2]
    mask: mx.array | str | None
    if isinstance(lengths, int) and mx.default_device() == mx.Device(mx.cpu):
        keys, values = keys[..., :lengths, :], values[..., :lengths, :]
        mask = None if queries == 1 else "causal"
        if window is not None and lengths > window:
            mask = visible(mx.array([lengths]), queries, lengths, window)[0]
    else:
        if isinstance(lengths, int):
            lengths = mx.array([lengths])
        mask = visible(lengths[: q.shape[0]], queries, keys.shape[2], window)[:, None]
    sinks = None if sinks is None else sinks.astype(q.dtype)
    return mx.fast.scaled_dot_product_attention(
        q, keys, values, scale=scale, mask=mask, sinks=sinks
    )
