"""An acceptance policy that is stricter than greedy, and still lossless."""

from __future__ import annotations

import mlx.core as mx

from draftloom import ComponentInfo, Draft, Preserves, SamplingState


class StrictMargin:
    """Keeps a draft token only where the target prefers it clearly.

    A rejected token that was right comes back as the correction, so the text is that of greedy
    decoding whatever the margin. Where a device's sums depend on the number of rows, it keeps close
    calls out of blocks.

    Args:
        margin: logits by which the best token must lead the second best, 0 or more.
    """

    info = ComponentInfo(
        "lab.strict-margin",
        "greedy, and only where the target is sure",
        preserves=Preserves.GREEDY,
    )

    def __init__(self, margin: float = 0.1) -> None:
        if margin < 0:
            raise ValueError(f"margin must be 0 or more, got {margin}")
        self.margin = margin

    def accept(
        self, draft: Draft, logits: mx.array, sampling: SamplingState
    ) -> tuple[mx.array, mx.array]:
        """num_accepted [B] and next_token [B], from logits [B, K+1, V]."""
        best = mx.argmax(logits, axis=-1).astype(mx.int32)
        second, first = mx.split(mx.topk(logits, 2, axis=-1).astype(mx.float32), 2, axis=-1)
        sure = (mx.abs(first - second) >= self.margin)[:, : draft.width, 0]
        kept = ((draft.tokens == best[:, : draft.width]) & sure).astype(mx.int32)
        num_accepted = mx.cumprod(kept, axis=1).sum(axis=1)
        return num_accepted, mx.take_along_axis(best, num_accepted[:, None], axis=1)[:, 0]
