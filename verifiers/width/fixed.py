"""Fixed width: the same number of draft tokens every cycle."""

from __future__ import annotations

from draftloom.contracts import ComponentInfo, Width

__all__ = ["FixedWidth"]


class FixedWidth:
    """Drafts and verifies `tokens` tokens a cycle; 0 is plain decoding.

    Args:
        tokens: K, not counting the anchor.
        verify: verify only the first so many of them; all by default.
        park: draft no more once the mismatch alarm has rung. By default the width stays as it was
            asked for: who fixes it measures, or wants runs that repeat.
    """

    info = ComponentInfo("fixed", "the same width every cycle")

    def __init__(self, tokens: int, verify: int | None = None, park: bool = False) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise ValueError(f"tokens must be a whole number >= 0, got {tokens!r}")
        if verify is not None and not 0 <= verify <= tokens:
            raise ValueError(f"verify must be in 0..{tokens}, got {verify!r}")
        self.tokens = tokens
        self._verify = tokens if verify is None else verify
        self._parks = park
        self._parked = False

    def park(self) -> bool:
        """Draft no more, where that was asked for. Whether it was."""
        self._parked = self._parks
        return self._parks

    def choose(self, limit: int) -> Width:
        """The same widths, within the drafter's limit."""
        if self._parked:
            return Width(0, 0)
        return Width(min(self.tokens, limit), min(self._verify, limit))

    def observe(self, drafted: int, verified: int, accepted: int, seconds: float) -> None:
        """Nothing to learn."""
