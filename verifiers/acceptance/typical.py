"""Typical acceptance: keeps what the target finds likely enough. Lossy, and says so."""

from __future__ import annotations

import mlx.core as mx

from draftloom.contracts import ComponentInfo, Draft, Preserves
from draftloom.sampling import SamplingState, law_of

from .speculative_sampling import at_tokens, draw_row

__all__ = ["TypicalAcceptance"]


class TypicalAcceptance:
    """Keeps a draft token x where p(x) > min(epsilon, delta * exp(-H(p))), H the entropy in nats.

    The next token is drawn from p. The text then follows neither the target's law nor the
    drafter's: where the target is unsure, the drafter's choices are taken. At temperature 0 it is
    greedy decoding.

    Args:
        epsilon: a token as likely as this is always kept, in (0, 1).
        delta: share of exp(-H) that suffices where the target is unsure, in (0, 1].

    Raises:
        ValueError: one of them is out of range.

    Source: Cai et al., "Medusa" (arXiv 2401.10774), section 3.3.2.
    """

    info = ComponentInfo(
        "typical",
        "keeps what the target finds likely enough; lossy",
        preserves=Preserves.NOTHING,
    )

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3) -> None:
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must be in (0, 1), got {epsilon}")
        if not 0 < delta <= 1:
            raise ValueError(f"delta must be in (0, 1], got {delta}")
        self._epsilon = epsilon
        self._delta = delta

    def accept(
        self, draft: Draft, logits: mx.array, sampling: SamplingState
    ) -> tuple[mx.array, mx.array]:
        """num_accepted [B] and next_token [B], from logits [B, K+1, V]."""
        p = law_of(logits, sampling.params)
        entropy = -(p * mx.log(mx.maximum(p, 1e-30))).sum(axis=-1)[:, : draft.width]
        least = mx.minimum(self._epsilon, self._delta * mx.exp(-entropy))
        kept = (at_tokens(p, draft.tokens) > least).astype(mx.int32)
        num_accepted = mx.cumprod(kept, axis=1).sum(axis=1).astype(mx.int32)
        return num_accepted, draw_row(p, num_accepted, sampling)
