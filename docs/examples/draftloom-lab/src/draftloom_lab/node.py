"""A node to insert after `verify`: it rewrites the logits in place."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from draftloom import ComponentInfo, Port

LOGITS = Port("logits", "[B, K+1, V]")


class BanTokens:
    """Tokens that must not come, in drafts as in plain decoding.

    Args:
        tokens: their ids.
    """

    info = ComponentInfo(
        "lab.ban-tokens",
        "tokens that must not come",
        inputs=(LOGITS,),
        outputs=(LOGITS,),
    )

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = mx.array(list(tokens))

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits [B, K+1, V] with minus infinity at the tokens."""
        banned = (mx.arange(logits.shape[-1])[:, None] == self._tokens).any(axis=1)
        return mx.where(banned, -mx.inf, logits)
