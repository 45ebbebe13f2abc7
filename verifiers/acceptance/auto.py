"""Greedy at temperature 0, speculative sampling above: what most users want."""

from __future__ import annotations

import mlx.core as mx

from draftloom.contracts import AcceptancePolicy, ComponentInfo, Draft, Preserves
from draftloom.sampling import SamplingParams, SamplingState

from .greedy import GreedyAcceptance
from .speculative_sampling import SpeculativeSampling

__all__ = ["AutoAcceptance"]


class AutoAcceptance:
    """Stands for the policy that suits the temperature of each request. Lossless either way."""

    info = ComponentInfo(
        "auto",
        "greedy at temperature 0, speculative-sampling above",
        preserves=Preserves.DISTRIBUTION,
    )

    def resolve(self, params: SamplingParams) -> AcceptancePolicy:
        """The policy for a request."""
        return GreedyAcceptance() if params.greedy else SpeculativeSampling()

    def accept(
        self, draft: Draft, logits: mx.array, sampling: SamplingState
    ) -> tuple[mx.array, mx.array]:
        """num_accepted [B] and next_token [B], from logits [B, K+1, V]."""
        return self.resolve(sampling.params).accept(draft, logits, sampling)
