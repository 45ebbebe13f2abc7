"""From tokens to text: whole characters only, and stop strings that may span tokens and blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftloom.errors import UsageError

__all__ = ["TextStream"]


class TextStream:
    """Turns tokens into text as they come.

    Holds back bytes of an unfinished character and text that may be the beginning of a stop
    string; what `push` returns never has to be taken back.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper; its `detokenizer` keeps incomplete characters back.
        stop: strings that end the text; they are not part of it.

    Attributes:
        text: everything returned so far.

    Raises:
        UsageError: an empty stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        if any(not s for s in stop):
            raise UsageError("a stop string is empty", "leave it out")
        self._detokenizer = tokenizer.detokenizer
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Take one token.

        Returns:
            The text that is certain now, and whether a stop string has just been completed.
        """
        self._detokenizer.add_token(token)
        return self._take(self._detokenizer.last_segment)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come and no stop string was met."""
        self._detokenizer.finalize()
        text, stopped = self._take(self._detokenizer.last_segment)
        if not stopped:
            text += self._held
            self.text += self._held
        self._held = ""
        return text

    def _take(self, segment: str) -> tuple[str, bool]:
        pending = self._held + segment
        found = [i for i in (pending.find(s) for s in self._stop) if i >= 0]
        if found:
            text, self._held, stopped = pending[: min(found)], "", True
        else:
            keep = max((_overlap(pending, s) for s in self._stop), default=0)
            text, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
            stopped = False
        self.text += text
        return text, stopped


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
