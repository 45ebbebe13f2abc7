"""In which order verify runs the state steps of a block: both call mlx-lm's own step.

`stepwise` gives the very bits of plain decoding (the default on the CPU); `block` is what mlx-lm
does with several tokens at once, and adds in another order (the default elsewhere, and ``off``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx

from draftloom.contracts import TargetInfo
from draftloom.kernels.check import Check

__all__ = ["ORDERS", "Order", "block", "stepwise"]

Step = Callable[..., mx.array]
"""mlx-lm's: (x, keys, queries, dt, cache, mask) -> outputs."""


class Order(Protocol):
    """How a block is run."""

    def __call__(self, step: Step, inputs: Sequence[mx.array], cache: Any, mask: Any) -> mx.array:
        """Outputs of a block, from x, keys, queries and dt [B, T, ...]."""


MAMBA = ("falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h")
"""Model types whose layers run Mamba-2's rule and record it."""


def _on_cpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


class _ForMamba:
    def why_not_for(self, target: TargetInfo) -> str | None:
        """Why a target has no use for the operation; None where it has."""
        return None if target.model_type in MAMBA else f"{target.model_type} has no Mamba-2 layers"


class _Stepwise(_ForMamba):
    """One token after another. A block that is verified has no mask."""

    STOCK = False

    def __call__(self, step: Step, inputs: Sequence[mx.array], cache: Any, mask: Any) -> mx.array:
        tokens = inputs[0].shape[1]
        parts = [step(*(v[:, t : t + 1] for v in inputs), cache, None) for t in range(tokens)]
        return mx.concatenate(parts, axis=1)

    def by_default(self) -> bool:
        """Whether `auto` takes this order here."""
        return _on_cpu()

    def checks(self) -> Iterator[Check]:
        """Parity with the reference."""
        from .checks import checks_of

        return checks_of(self)


class _Block(_ForMamba):
    """The whole block at once."""

    STOCK = True

    def __call__(self, step: Step, inputs: Sequence[mx.array], cache: Any, mask: Any) -> mx.array:
        return step(*inputs, cache, mask)

    def by_default(self) -> bool:
        """Whether `auto` takes this order here."""
        return not _on_cpu()

    def checks(self) -> Iterator[Check]:
        """Parity with the reference."""
        from .checks import checks_of

        return checks_of(self)


stepwise, block = _Stepwise(), _Block()
ORDERS: dict[str, Order] = {"stepwise": stepwise, "block": block}
