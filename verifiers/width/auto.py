"""Automatic width: what pays here, and a width that repeats where a run is to repeat."""

from __future__ import annotations

from typing import Any

from draftloom.contracts import ComponentInfo, WidthPolicy
from draftloom.sampling import SamplingParams

from .adaptive import AdaptiveWidth
from .fixed import FixedWidth

__all__ = ["AutoWidth"]


class AutoWidth(AdaptiveWidth):
    """Adaptive, but fixed at the drafter's own width for texts that are sampled with a seed: what
    is drawn depends on the widths, and an adaptive one follows the clock.

    Args:
        default: draft tokens of a cycle where the width is fixed.
        park: draft no more once the mismatch alarm has rung.
        **options: of `AdaptiveWidth`.
    """

    info = ComponentInfo("auto", "adaptive; the drafter's own width where a sampled text repeats")

    def __init__(self, default: int, park: bool = True, **options: Any) -> None:
        super().__init__(park=park, **options)
        self._fixed = FixedWidth(default, park=park)

    def park(self) -> bool:
        """Draft no more, for texts of either kind. Whether it drafts no more."""
        self._fixed.park()
        return super().park()

    def resolve(self, params: SamplingParams) -> WidthPolicy:
        """The policy that serves a request with these parameters."""
        return self if params.greedy or params.seed is None else self._fixed
