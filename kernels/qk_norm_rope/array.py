"""MLX's own norms and rotary positions, one after the other, in the order of mlx-lm's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from draftloom.kernels.check import Check

from .placing import Heads, Rotation

__all__ = ["STOCK", "by_default", "checks", "place"]

STOCK = True


def by_default() -> bool:
    """Whether `auto` runs this here: wherever no kernel does."""
    from .dispatch import OPERATION

    return OPERATION.default() == "array"


def checks() -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of("array")


def place(
    rows: mx.array, heads: Heads, norms: tuple[Any, Any], rotation: Rotation
) -> tuple[mx.array, mx.array]:
    """As :func:`..dispatch.place`."""
    batch, tokens, _ = rows.shape
    end, stop = heads.ends
    queries = rows[..., :end].reshape(batch, tokens, heads.queries, heads.step)
    keys = rows[..., end:stop].reshape(batch, tokens, heads.keys, heads.size)
    found = [
        rotation(norm(x).transpose(0, 2, 1, 3))
        for norm, x in zip(norms, (queries[..., : heads.size], keys), strict=True)
    ]
    return found[0], found[1]
