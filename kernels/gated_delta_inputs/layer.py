"""What goes in and what comes out."""

from __future__ import annotations

from typing import NamedTuple

import attrs
import mlx.core as mx
import mlx.nn as nn

__all__ = ["Layer", "Prepared", "Projected"]


@attrs.frozen(eq=False)
class Layer:
    """Parameters and sizes of a gated-delta layer.

    Attributes:
        conv: its depthwise convolution, weight [C, W + 1, 1]; C is 2 Hk Dk + Hv Dv.
        a_log: [Hv], the log of minus the decay rate.
        dt_bias: [Hv].
        key_heads, value_heads: Hk, Hv.
        key_size, value_size: Dk, Dv.
    """

    conv: nn.Module
    a_log: mx.array
    dt_bias: mx.array
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int


class Projected(NamedTuple):
    """What the layer's projections give for T tokens.

    Attributes:
        qkv: [B, T, C], queries, keys and values side by side.
        a: [B, T, Hv], of the decay.
        b: [B, T, Hv], of the write strength.
    """

    qkv: mx.array
    a: mx.array
    b: mx.array


class Prepared(NamedTuple):
    """What the recurrence wants.

    Attributes:
        q: [B, T, Hk, Dk], of length Dk^-0.5.
        k: [B, T, Hk, Dk], of length 1.
        v: [B, T, Hv, Dv].
        g: [B, T, Hv] float32, decays, 0..1.
        beta: [B, T, Hv], write strengths, 0..1; float32 from a kernel, of b's dtype else.
        window: [B, W + T, C], the convolution's input: what the cache held, then qkv (zero where
            the mask is False).
    """

    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array
    beta: mx.array
    window: mx.array
