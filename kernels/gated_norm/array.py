"""The layer's own norm module: mlx-lm's order of operations, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from draftloom.kernels.check import Check
from draftloom.kernels.gated_delta.targets import why_not_for

__all__ = ["STOCK", "by_default", "checks", "normalise", "why_not_for"]

STOCK = True


def by_default() -> bool:
    """Whether `auto` runs this here: wherever no kernel does."""
    from .dispatch import OPERATION

    return OPERATION.default() == "array"


def checks() -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of("array")


def normalise(norm: Any, y: mx.array, z: mx.array) -> mx.array:
    """As :func:`..dispatch.normalise`."""
    output: mx.array = norm(y, z)
    return output
