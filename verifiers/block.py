"""The block verifier: one pass over [anchor, d1 .. dK]."""

from __future__ import annotations

import mlx.core as mx

from draftloom.contracts import ComponentInfo, Speculation, TargetAdapter, TargetOutput

__all__ = ["BlockVerifier"]


class BlockVerifier:
    """Verifies the whole block in one pass of the target."""

    info = ComponentInfo("block", "one pass over the whole block")

    def verify(
        self, target: TargetAdapter, block: mx.array, speculation: Speculation
    ) -> TargetOutput:
        """Logits [B, K+1, V] and features [B, K+1, F] of block [B, K+1]."""
        return target.forward(block, speculation.cache)
