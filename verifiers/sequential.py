"""The sequential verifier: one token a pass. Slow, and the oracle for tests."""

from __future__ import annotations

import mlx.core as mx

from draftloom.contracts import ComponentInfo, Speculation, TargetAdapter, TargetOutput

__all__ = ["SequentialVerifier"]


class SequentialVerifier:
    """Verifies token by token, in the very shapes of plain decoding.

    Where a device's products depend on the number of rows (bf16 on CUDA), this one equals plain
    decoding bit for bit.
    """

    info = ComponentInfo("sequential", "one token a pass: slow, exact on every device")

    def verify(
        self, target: TargetAdapter, block: mx.array, speculation: Speculation
    ) -> TargetOutput:
        """Logits [B, K+1, V] and features [B, K+1, F] of block [B, K+1]."""
        outputs = [
            target.forward(block[:, i : i + 1], speculation.cache) for i in range(block.shape[1])
        ]
        logits = mx.concatenate([output.logits for output in outputs], axis=1)
        features = [output.features for output in outputs if output.features is not None]
        return TargetOutput(logits, mx.concatenate(features, axis=1) if features else None)
