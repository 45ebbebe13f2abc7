"""No drafting: the target alone, through the same loop."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from draftloom.contracts import ComponentInfo, Draft, DraftLaw, DraftRequest
from draftloom.sampling import SamplingState

__all__ = ["NoDrafter"]


class NoDrafter:
    """Never proposes anything."""

    info = ComponentInfo(
        "none", "no drafting: plain decoding", law=DraftLaw.DETERMINISTIC, default_width=0
    )

    def open(self, request: DraftRequest) -> NoDrafter:
        """There is nothing to remember."""
        return self

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Nothing to learn."""

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """Nothing."""
        return Draft.empty(anchor.shape[0])
