"""Parity checks on the default device: every implementation against the float32 reference.

Tolerances: the output is rounded to the dtype of y; array code rounds the norm as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import attrs
import mlx.core as mx
from mlx_lm.models.qwen3_next import Qwen3NextRMSNormGated

from draftloom.kernels.check import Check

from . import reference
from .dispatch import normalise

__all__ = ["CASES", "KERNEL_CASES", "Case", "checks_of"]

TOLERANCE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@attrs.frozen
class Case:
    """A shape to check: dtype, [B, T, Hv, Dv], whether the gates are a slice of another array."""

    dtype: mx.Dtype
    shape: tuple[int, int, int, int]
    sliced: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).rpartition(".")[2]
        rows, tokens, heads, size = self.shape
        return f"{kind} B{rows} T{tokens} Hv{heads} {size}{' sliced' * self.sliced}"

    def arrays(self) -> tuple[Any, mx.array, mx.array]:
        """The norm, y and z."""
        keys = iter(mx.random.split(mx.random.key(13), 3))
        rows, tokens, heads, size = self.shape
        norm = Qwen3NextRMSNormGated(size, eps=1e-6)
        norm.weight = mx.random.normal((size,), key=next(keys)).astype(self.dtype)
        y = mx.random.normal(self.shape, key=next(keys)).astype(self.dtype)
        wide = mx.random.normal((rows, tokens, 7 + heads * size), key=next(keys))
        z = wide.astype(self.dtype)[..., 7:]
        z = z if self.sliced else mx.contiguous(z)
        return norm, y, z.reshape(self.shape)


CASES = (
    Case(mx.float32, (2, 5, 2, 32)),
    Case(mx.float32, (1, 33, 3, 96), sliced=True),
    Case(mx.bfloat16, (1, 1, 4, 128)),
    Case(mx.bfloat16, (2, 16, 4, 128), sliced=True),
    Case(mx.float16, (3, 7, 1, 256)),
)
KERNEL_CASES = tuple(CASES[i] for i in (1, 2, 3, 4))
"""Those for built-in kernels: every dtype, slices. Each shape and dtype is
compiled, up to a second on a user\'s device; the tests run the others."""


def checks_of(implementation: Any) -> Iterator[Check]:
    """All checks of an implementation: a name, or an object as `choose` takes it."""
    for case in KERNEL_CASES if implementation in ("cuda", "metal") else CASES:
        norm, y, z = case.arrays()
        found = partial(_listed, normalise, norm, y, z, use=implementation)
        truth = partial(_listed, reference.normalise, y, z, norm.weight, norm.eps)
        yield Check(f"normalise {case}", found, truth, (TOLERANCE[case.dtype],))


def _listed(run: Any, *args: Any, **kwargs: Any) -> list[mx.array]:
    return [run(*args, **kwargs)]
