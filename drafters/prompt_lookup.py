"""Prompt lookup: what followed the last time the text ended like this.

Source: Saxena, "Prompt Lookup Decoding" (2023); n-gram drafting as in transformers and vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from draftloom.contracts import ComponentInfo, Draft, DraftLaw, DraftRequest
from draftloom.sampling import SamplingState

__all__ = ["PromptLookupDrafter"]


class PromptLookupDrafter:
    """Copies what followed an earlier occurrence of the last n tokens, in prompt and output.

    Args:
        max_ngram: longest ending looked for.
        min_ngram: shortest ending looked for.

    Raises:
        ValueError: not 1 <= min_ngram <= max_ngram.
    """

    info = ComponentInfo(
        "prompt-lookup",
        "copies what followed the same n-gram earlier in the text",
        law=DraftLaw.DETERMINISTIC,
        default_width=8,
    )

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"1 <= min_ngram <= max_ngram, got {min_ngram} and {max_ngram}")
        self._sizes = range(max_ngram, min_ngram - 1, -1)

    def open(self, request: DraftRequest) -> _Session:
        """Begin a generation."""
        return _Session(self._sizes, len(request.prompt))


class _Session:
    """One index a row. Each token is indexed once, when the token after it is known."""

    def __init__(self, sizes: range, rows: int) -> None:
        self._rows = [_Index(sizes) for _ in range(rows)]

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        for index, tokens in zip(self._rows, committed, strict=True):
            index.extend(tokens)

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        # The engine has read the anchor already: this list does not wait for the device.
        anchors: Any = anchor.tolist()
        found = [
            index.lookup(token, width) for index, token in zip(self._rows, anchors, strict=True)
        ]
        shortest = min(map(len, found))
        if not shortest:
            return Draft.empty(len(found))
        tokens = mx.array([tokens[:shortest] for tokens in found], dtype=mx.int32)
        return Draft.deterministic(tokens, source="prompt-lookup")


class _Index:
    """Where each n-gram of a growing text was last followed by something."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text; costs one entry a token and n-gram size."""
        for token in tokens:
            position = len(self._tokens)
            for size in self._sizes:
                if size <= position:
                    self._follows[tuple(self._tokens[position - size :])] = position
            self._tokens.append(token)

    def lookup(self, anchor: int, width: int) -> list[int]:
        """Up to `width` tokens that followed the longest known ending of text + anchor. A copy
        that runs into the end of the text goes on with what it has copied itself."""
        ending = (*self._tokens[-self._sizes.start :], anchor)
        for size in self._sizes:
            start = self._follows.get(ending[-size:]) if size <= len(ending) else None
            if start is not None:
                known = [*self._tokens[start : start + width], anchor]
                period = len(self._tokens) + 1 - start
                copied = known[: min(width, period)]
                while len(copied) < width:
                    copied.append(copied[len(copied) - period])
                return copied
        return []
