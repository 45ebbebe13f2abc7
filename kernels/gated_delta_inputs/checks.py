"""Parity checks on the default device: every implementation against the float32 reference.

Tolerances (largest difference over the largest value): q, k and v are rounded to the dtype of qkv
(array code rounds after every operation), gates of array code to that of their inputs. The window
is a copy: bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn

from draftloom.kernels.check import Check

from . import reference
from .dispatch import prepare
from .layer import Layer, Projected

__all__ = ["CASES", "KERNEL_CASES", "Case", "checks_of"]

KERNEL = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
ARRAY = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@attrs.frozen
class Case:
    """A shape to check.

    Attributes:
        dtype: of everything but a_log.
        rows, tokens, key_heads: B, T, Hk.
        sharing: Hv / Hk.
        sizes: Dk, Dv.
        taps: of the convolution.
        masked: whether a mask with holes that differ by row is given.
        sliced: whether qkv, a and b are slices of one array, as of a packed product.
    """

    dtype: mx.Dtype
    rows: int
    tokens: int
    key_heads: int = 1
    sharing: int = 2
    sizes: tuple[int, int] = (32, 32)
    taps: int = 4
    masked: bool = False
    sliced: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).rpartition(".")[2]
        heads = f"Hk{self.key_heads} Hv{self.key_heads * self.sharing}"
        shape = f"B{self.rows} T{self.tokens} {heads} {self.sizes[0]}x{self.sizes[1]}"
        ends = [" masked"] * self.masked + [" sliced"] * self.sliced
        return f"{kind} {shape} taps{self.taps}{''.join(ends)}"

    def arrays(self) -> tuple[Layer, Projected, mx.array, mx.array | None]:
        """The layer, the projections, the rows before, the mask."""
        keys = iter(mx.random.split(mx.random.key(11), 6))
        (dk, dv), heads = self.sizes, self.key_heads * self.sharing
        channels = 2 * self.key_heads * dk + heads * dv
        shape = (self.rows, self.tokens)

        def normal(*size: int) -> mx.array:
            return mx.random.normal(size, key=next(keys)).astype(self.dtype)

        wide = normal(*shape, channels + 2 * heads)
        qkv, a, b = mx.split(wide, [channels, channels + heads], axis=-1)
        if not self.sliced:
            qkv, a, b = (mx.contiguous(x) for x in (qkv, a, b))
        conv = nn.Conv1d(channels, channels, self.taps, groups=channels, bias=False)
        conv.weight = 0.5 * normal(channels, self.taps, 1)
        layer = Layer(
            conv=conv,
            a_log=mx.log(mx.random.uniform(0.02, 8.0, (heads,), key=next(keys))),
            dt_bias=normal(heads),
            key_heads=self.key_heads,
            value_heads=heads,
            key_size=dk,
            value_size=dv,
        )
        before = normal(self.rows, self.taps - 1, channels)
        mask = None
        if self.masked:
            token, row = mx.arange(self.tokens)[None], mx.arange(self.rows)[:, None]
            mask = (3 * token + row) % 4 != 0
        return layer, Projected(qkv, a, b), before, mask


CASES = (
    Case(mx.float32, 2, 5),
    Case(mx.float32, 3, 16, sharing=1, sizes=(64, 32), masked=True),
    Case(mx.float32, 1, 33, key_heads=2, sharing=4, sizes=(32, 96), taps=3),
    Case(mx.bfloat16, 1, 1, key_heads=2, sizes=(128, 128)),
    Case(mx.bfloat16, 2, 16, key_heads=2, sizes=(128, 128), sliced=True),
    Case(mx.bfloat16, 3, 7, sharing=4, masked=True, sliced=True),
    Case(mx.float16, 2, 2, key_heads=2, sharing=1, sizes=(64, 64)),
    Case(mx.float16, 1, 4, sizes=(256, 64), masked=True),
)
KERNEL_CASES = tuple(CASES[i] for i in (2, 3, 4, 5, 7))
"""Those for built-in kernels: every dtype, a mask, slices. Each shape and dtype is
compiled, up to a second on a user\'s device; the tests run the others."""


def checks_of(implementation: Any) -> Iterator[Check]:
    """All checks of an implementation.

    Args:
        implementation: a name, or an object as `choose` takes it.
    """
    for case in KERNEL_CASES if implementation in ("cuda", "metal") else CASES:
        arrays = case.arrays()
        of = (ARRAY if implementation == "array" else KERNEL)[case.dtype]
        gates = of if implementation == "array" else KERNEL[mx.float32]
        run = partial(prepare, *arrays, use=implementation)
        truth = partial(reference.prepare, *arrays)
        yield Check(f"prepare {case}", run, truth, (of, of, of, gates, gates, 0.0))
