"""Parity checks on the default device: every implementation against the float32 reference.

Tolerances: the output is rounded to the dtype of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import attrs
import mlx.core as mx

from draftloom.kernels.check import Check

from . import reference
from .dispatch import product

__all__ = ["CASES", "Case", "checks_of"]

TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@attrs.frozen
class Case:
    """A shape to check: dtype, rows of x, N, D."""

    dtype: mx.Dtype
    rows: int
    outputs: int
    size: int

    def __str__(self) -> str:
        kind = str(self.dtype).rpartition(".")[2]
        return f"{kind} M{self.rows} N{self.outputs} D{self.size}"

    def arrays(self) -> tuple[mx.array, mx.array]:
        """x and the matrix."""
        first, second = mx.random.split(mx.random.key(17), 2)
        x = mx.random.normal((1, self.rows, self.size), key=first)
        weight = mx.random.normal((self.outputs, self.size), key=second)
        return x.astype(self.dtype), (weight / self.size**0.5).astype(self.dtype)


CASES = (
    Case(mx.bfloat16, 16, 48, 2560),
    Case(mx.bfloat16, 2, 8448, 96),
    Case(mx.float16, 23, 80, 352),
    Case(mx.bfloat16, 5, 24, 64),
)


def checks_of(implementation: Any) -> Iterator[Check]:
    """All checks of an implementation: a name, or an object as `choose` takes it."""
    for case in CASES:
        x, weight = case.arrays()
        found = partial(_listed, product, x, weight, use=implementation)
        truth = partial(_listed, reference.product, x, weight)
        yield Check(f"product {case}", found, truth, (TOLERANCE[case.dtype],))


def _listed(run: Any, *args: Any, **kwargs: Any) -> list[mx.array]:
    return [run(*args, **kwargs)]
