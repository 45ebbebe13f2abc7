"""Parity checks on the default device: every implementation against the float32 reference.

Tolerances: the sum is rounded to the dtype, by the reference too; what is scaled, and that times
the weight, are rounded to it as well.
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
from .dispatch import add_norm

__all__ = ["CASES", "KERNEL_CASES", "TOLERANCE", "Case", "checks_of"]

TOLERANCE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@attrs.frozen
class Case:
    """A shape to check: dtype, [B, T, D]."""

    dtype: mx.Dtype
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        kind = str(self.dtype).rpartition(".")[2]
        rows, tokens, size = self.shape
        return f"{kind} B{rows} T{tokens} {size}"

    def arrays(self) -> tuple[mx.array, mx.array, nn.RMSNorm]:
        """What is added, and the norm."""
        one, two, three = mx.random.split(mx.random.key(19), 3)
        norm = nn.RMSNorm(self.shape[-1], eps=1e-6)
        norm.weight = (1 + 0.3 * mx.random.normal((self.shape[-1],), key=three)).astype(self.dtype)
        x, y = (mx.random.normal(self.shape, key=key).astype(self.dtype) for key in (one, two))
        return x, y, norm


CASES = (
    Case(mx.float32, (2, 5, 64)),
    Case(mx.float32, (1, 3, 1000)),
    Case(mx.bfloat16, (1, 16, 2560)),
    Case(mx.bfloat16, (4, 1, 20)),
    Case(mx.float16, (1, 7, 576)),
)
KERNEL_CASES = tuple(CASES[i] for i in (1, 2, 4))
"""Those for built-in kernels: every dtype, a last part that is not full. Each shape and dtype is
compiled, up to a second on a user's device; the tests run the others."""


def checks_of(implementation: Any) -> Iterator[Check]:
    """All checks of an implementation: a name, or an object as `choose` takes it."""
    for case in KERNEL_CASES if implementation in ("cuda", "metal") else CASES:
        x, y, norm = case.arrays()
        found = partial(_listed, add_norm, x, y, norm, use=implementation)
        truth = partial(_listed, reference.add_norm, x, y, norm)
        yield Check(f"add and norm {case}", found, truth, (0.0, TOLERANCE[case.dtype]))


def _listed(run: Any, *args: Any, **kwargs: Any) -> list[mx.array]:
    return list(run(*args, **kwargs))
