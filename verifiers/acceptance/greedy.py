"""Greedy acceptance: the longest prefix that the target would have written itself."""

from __future__ import annotations

import mlx.core as mx

from draftloom.contracts import ComponentInfo, Draft, Preserves
from draftloom.sampling import SamplingState, log_probs

__all__ = ["GreedyAcceptance"]


class GreedyAcceptance:
    """Keeps draft tokens as long as each is the target's most likely one."""

    info = ComponentInfo(
        "greedy",
        "longest prefix equal to the target's argmax",
        preserves=Preserves.GREEDY,
    )

    def accept(
        self, draft: Draft, logits: mx.array, sampling: SamplingState
    ) -> tuple[mx.array, mx.array]:
        """num_accepted [B] and next_token [B], from logits [B, K+1, V].

        The argmax is taken of log-probabilities, as in mlx-lm's `generate_step`.
        """
        best = mx.argmax(log_probs(logits), axis=-1).astype(mx.int32)
        agrees = draft.tokens == best[:, : draft.width]
        if draft.lengths is not None:
            agrees = agrees & draft.stands()
        num_accepted = mx.cumprod(agrees.astype(mx.int32), axis=1).sum(axis=1)
        next_token = mx.take_along_axis(best, num_accepted[:, None], axis=1)[:, 0]
        return num_accepted, next_token
