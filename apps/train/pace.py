"""How fast a run goes: steps on the device, and the time and work since the last record."""

from __future__ import annotations

import time

import attrs
import mlx.core as mx

__all__ = ["Launched", "Since"]


@attrs.frozen(eq=False)
class Launched:
    """A step on the device: its number, [loss, norm] and a group's signals, shares of right slots,
    learning rate, and how many tokens, blocks and operations it took."""

    step: int
    numbers: mx.array
    shares: mx.array
    rate: float
    tokens: int
    blocks: int
    operations: int


class Since:
    """Time and work since the last record, or since training went on."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self.seconds = 0.0
        self.steps = self.tokens = self.blocks = self.operations = 0
        self.last: Launched | None = None

    def add(self, launched: Launched) -> float:
        """Count a step that is done; the seconds it took."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self.seconds += seconds
        self.steps, self.last = self.steps + 1, launched
        self.tokens, self.blocks = self.tokens + launched.tokens, self.blocks + launched.blocks
        self.operations += launched.operations
        return seconds
