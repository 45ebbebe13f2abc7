"""In which order verify runs the state steps of a block: both call mlx-lm's own step.

`stepwise` gives the very bits of plain decoding (the default on the CPU); `block` is what mlx-lm
does with several tokens at once, and adds in another order (the default elsewhere, and ``off``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

__all__ = ["ORDERS", "Order", "block", "stepwise"]

Order = Callable[[Callable[..., mx.array], Sequence[mx.array], Any, Any], mx.array]
"""(step, inputs [B, T, ...], cache, mask) -> outputs [B, T, ...]."""


def stepwise(
    step: Callable[..., mx.array], inputs: Sequence[mx.array], cache: Any, mask: Any
) -> mx.array:
    """One token after another. A block that is verified has no mask."""
    tokens = inputs[0].shape[1]
    parts = [step(*(v[:, t : t + 1] for v in inputs), cache, None) for t in range(tokens)]
    return mx.concatenate(parts, axis=1)


def block(
    step: Callable[..., mx.array], inputs: Sequence[mx.array], cache: Any, mask: Any
) -> mx.array:
    """The whole block at once."""
    return step(*inputs, cache, mask)


ORDERS: dict[str, Order] = {"stepwise": stepwise, "block": block}
