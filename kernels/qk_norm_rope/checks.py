"""Parity checks on the default device: every implementation against the float32 reference.

Tolerances: results are rounded to the dtype of the product, and so is what comes of the norm,
before it is rotated. Cosines and sines of float32 angles differ between devices by a few 1e-6.
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
from .dispatch import place
from .placing import Heads, Rotation

__all__ = ["CASES", "KERNEL_CASES", "TOLERANCE", "Case", "checks_of"]

TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@attrs.frozen
class Case:
    """A shape to check.

    Attributes:
        dtype: of the product and the norms' weights.
        batch: [B, T].
        heads: (Hq, Hk, D).
        dims: numbers of a head that are rotated.
        offset: the position of the first token.
        gated: whether a gate lies behind every head of q.
        traditional: whether neighbours are rotated, or halves.
    """

    dtype: mx.Dtype
    batch: tuple[int, int]
    heads: tuple[int, int, int]
    dims: int
    offset: int = 0
    gated: bool = False
    traditional: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).rpartition(".")[2]
        queries, keys, size = self.heads
        more = " gated" * self.gated + " traditional" * self.traditional
        return (
            f"{kind} B{self.batch[0]} T{self.batch[1]} Hq{queries} Hk{keys} {size} "
            f"R{self.dims} at {self.offset}{more}"
        )

    def arrays(self) -> tuple[mx.array, Heads, tuple[Any, Any], nn.RoPE]:
        """The product (with something behind the keys), where heads lie in it, norms, the rope."""
        one, two, three = mx.random.split(mx.random.key(17), 3)
        queries, keys, size = self.heads
        heads = Heads(queries, keys, size, size * (1 + self.gated))
        width = heads.ends[1] + keys * size
        rows = mx.random.normal((*self.batch, width), key=one).astype(self.dtype)
        norms = nn.RMSNorm(size, eps=1e-6), nn.RMSNorm(size, eps=1e-6)
        for norm, key in zip(norms, (two, three), strict=True):
            norm.weight = (1 + 0.3 * mx.random.normal((size,), key=key)).astype(self.dtype)
        return rows, heads, norms, nn.RoPE(self.dims, self.traditional, base=1e6)


CASES = (
    Case(mx.float32, (2, 5), (3, 1, 32), 32, offset=7),
    Case(mx.float32, (1, 33), (2, 2, 96), 48, gated=True),
    Case(mx.bfloat16, (1, 16), (16, 4, 256), 64, offset=1000, gated=True),
    Case(mx.bfloat16, (1, 16), (6, 2, 64), 64, offset=3),
    Case(mx.float16, (3, 7), (4, 2, 64), 16, offset=90, traditional=True),
    Case(mx.bfloat16, (1, 1), (8, 8, 128), 128, offset=4095),
)
KERNEL_CASES = tuple(CASES[i] for i in (1, 2, 3, 4))
"""Those for built-in kernels: every dtype, gates, a part of a head. Each shape and dtype is
compiled, up to a second on a user's device; the tests run the others."""


def checks_of(implementation: Any) -> Iterator[Check]:
    """All checks of an implementation: a name, or an object as `choose` takes it."""
    for case in KERNEL_CASES if implementation in ("cuda", "metal") else CASES:
        rows, heads, norms, rope = case.arrays()
        rotation = Rotation(rope, case.offset)
        found = partial(_listed, place, rows, heads, norms, rotation, use=implementation)
        truth = partial(_listed, reference.place, rows, heads, norms, rope, case.offset)
        yield Check(f"place {case}", found, truth, (TOLERANCE[case.dtype],) * 2)


def _listed(run: Any, *args: Any, **kwargs: Any) -> list[mx.array]:
    return list(run(*args, **kwargs))
