"""How far a text may go: the caller's limit, and the target's context."""

from __future__ import annotations

import attrs

from draftloom.contracts import TargetInfo
from draftloom.errors import UsageError
from draftloom.parts import EngineRequest

__all__ = ["Room"]

UNKNOWN = 2**16
"""Positions of a context that states no limit: more than any block."""


@attrs.frozen
class Room:
    """What a generation may take.

    Attributes:
        tokens: that may be generated.
        positions: that the context has for what is written.
        whole: verify whole blocks to the end of the text, where the context has room for them; what
            is too much is cut off.
    """

    tokens: int
    positions: int
    whole: bool = False

    @classmethod
    def of(cls, info: TargetInfo, request: EngineRequest, past: int, *, whole: bool) -> Room:
        """See that a prompt can be run, and what is left behind it.

        Args:
            info: of the target.
            request: prompt and limit.
            past: tokens that the caches hold before the prompt.
            whole: as the attribute.

        Raises:
            UsageError: an empty prompt, a token outside the vocabulary, a limit below 1, no limit
                at all, or a prompt that fills the context.
        """
        limit, prompt, wanted = info.context_limit, len(request.prompt), request.max_tokens
        if not prompt:
            raise UsageError("the prompt is empty", "give at least one token")
        outside = [t for t in request.prompt if not 0 <= t < info.vocab_size]
        if outside:
            raise UsageError(
                f"prompt token {outside[0]} is outside the vocabulary of {info.vocab_size}",
                "was the prompt encoded with this target's tokenizer?",
            )
        if wanted is not None and wanted < 1:
            raise UsageError(f"max_tokens must be at least 1, got {wanted}")
        if limit is None:
            if wanted is None:
                raise UsageError("this target states no context limit", "give max_tokens")
            return cls(wanted, UNKNOWN, whole)
        room = limit - past - prompt
        if room <= 0:
            raise UsageError(
                f"the prompt has {past + prompt} tokens, the target's context holds {limit}",
                "shorten the prompt",
            )
        return cls(room if wanted is None else min(wanted, room), room, whole)

    def for_drafts(self, written: int, verify: int) -> int:
        """Draft tokens that may be verified behind `written` tokens, those generated and those that
        the cycle writes besides, where `verify` make a whole block."""
        room = self.tokens - written
        if self.whole and 0 < room < verify:
            return max(room, min(verify, self.positions - written))
        return room
