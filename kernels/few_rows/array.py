"""MLX's own product."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from draftloom.kernels.check import Check

__all__ = ["STOCK", "by_default", "checks", "product"]

STOCK = True


def by_default() -> bool:
    """Whether `auto` runs this here: wherever no kernel does."""
    from .dispatch import OPERATION

    return OPERATION.default() == "array"


def checks() -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of("array")


def product(x: mx.array, weight: mx.array) -> mx.array:
    """As :func:`..dispatch.product`."""
    return x @ mx.swapaxes(weight, -1, -2)
