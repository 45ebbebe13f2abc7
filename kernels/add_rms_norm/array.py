"""MLX's own addition and norm, in the order of mlx-lm's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from draftloom.kernels.check import Check

__all__ = ["STOCK", "add_norm", "by_default", "checks"]

STOCK = True


def by_default() -> bool:
    """Whether `auto` runs this here: wherever no kernel does."""
    from .dispatch import OPERATION

    return OPERATION.default() == "array"


def checks() -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of("array")


def add_norm(x: mx.array, y: mx.array, norm: Any) -> tuple[mx.array, mx.array]:
    """As :func:`..dispatch.add_norm`."""
    total = x + y
    return total, norm(total)
