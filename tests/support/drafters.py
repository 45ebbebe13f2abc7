"""Drafters that know the right answer, and drafters that mislead on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from draftloom.contracts import (
    ComponentInfo,
    Draft,
    DraftLaw,
    DraftRequest,
    Need,
)
from draftloom.sampling import SamplingState

__all__ = ["MODES", "DenseDrafter", "FixedDrafter", "ScriptedDrafter", "ScriptedSession"]

MODES = ("right", "wrong", "half", "random", "short", "mixed")


class ScriptedDrafter:
    """Knows the target's own text and corrupts it at drawn positions.

    Args:
        text: prompt and continuation, longer than will be generated.
        vocab_size: V.
        mode: ``right``; ``wrong`` at the first token; ``half``: wrong at a drawn one, right before
            and after it; ``random`` tokens; ``short``: right, but fewer than asked for, or none;
            ``mixed``: one of those, drawn each cycle.
        seed: of the draws.
        taps: layers it wants the outputs of.

    Attributes:
        session: that of the last generation.
        start: tokens of the text that are in the caches when a generation begins.
    """

    info = ComponentInfo("test.scripted", law=DraftLaw.DETERMINISTIC, default_width=4)

    def __init__(
        self,
        text: tuple[int, ...],
        vocab_size: int,
        mode: str = "right",
        seed: int = 0,
        taps: tuple[int, ...] = (),
    ) -> None:
        self.info = ComponentInfo(
            "test.scripted",
            needs=(Need.TAPS,) if taps else (),
            law=DraftLaw.DETERMINISTIC,
            tap_layers=taps,
        )
        self._make = lambda rest: ScriptedSession(
            rest, vocab_size, mode, np.random.default_rng(seed)
        )
        self._text = text
        self.session: ScriptedSession | None = None
        self.start = 0

    def open(self, request: DraftRequest) -> ScriptedSession:
        """Begin a generation."""
        self.session = self._make(self._text[self.start :])
        return self.session


class ScriptedSession:
    """Remembers what it was shown.

    Attributes:
        seen: committed tokens, all calls together.
        features: what came with them.
        agreeing: of the last proposal, how many tokens from its start are the target's own.
    """

    def __init__(
        self, text: tuple[int, ...], vocab_size: int, mode: str, rng: np.random.Generator
    ) -> None:
        self._text = text
        self._vocab_size = vocab_size
        self._mode = mode
        self._rng = rng
        self.seen: list[int] = []
        self.features: list[mx.array] = []
        self.agreeing = 0

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Keep everything, to be compared with what the target computes by itself."""
        (tokens,) = committed
        self.seen.extend(tokens)
        if features is not None:
            assert features.shape[1] >= len(tokens)
            self.features.append(features[:, : len(tokens)])

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """The text that follows, corrupted."""
        start = len(self.seen) + 1
        assert anchor.tolist() == [self._text[start - 1]], "the anchor is not the text's"
        right = list(self._text[start : start + width])
        mode = self._mode
        if mode == "mixed":
            mode = MODES[self._rng.integers(len(MODES) - 1)]
        tokens = self._corrupt(right, mode)
        pairs = [ours == theirs for ours, theirs in zip(tokens, right, strict=False)]
        self.agreeing = pairs.index(False) if False in pairs else len(pairs)
        return Draft.deterministic(mx.array([tokens], dtype=mx.int32).reshape(1, -1), source=mode)

    def _corrupt(self, right: list[int], mode: str) -> list[int]:
        if mode == "random":
            return [int(t) for t in self._rng.integers(self._vocab_size, size=len(right))]
        if mode == "short":
            return right[: self._rng.integers(len(right) + 1)]
        tokens = list(right)
        if mode in ("wrong", "half") and tokens:
            at = 0 if mode == "wrong" else int(self._rng.integers(len(tokens)))
            shift = 1 + int(self._rng.integers(self._vocab_size - 1))
            tokens[at] = (tokens[at] + shift) % self._vocab_size
        return tokens


class FixedDrafter:
    """Drafts from a text of its own, whatever the target writes.

    Args:
        text: position i of the draft is position i of this.
    """

    info = ComponentInfo("test.fixed", law=DraftLaw.DETERMINISTIC, default_width=3)

    def __init__(self, text: tuple[int, ...]) -> None:
        self._text = text
        self._seen = 0

    def open(self, request: DraftRequest) -> FixedDrafter:
        """Begin a generation."""
        self._seen = 0
        return self

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Count."""
        self._seen += len(committed[0])

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """What follows in the text."""
        start = self._seen + 1
        return Draft.deterministic(mx.array([self._text[start : start + width]], dtype=mx.int32))


class DenseDrafter:
    """Draws from a law of its own that has nothing to do with the target: q is misleading, and
    differs from position to position.

    Args:
        laws: [n, V] rows of q; position i of a text is drafted from row i modulo n.
        candidates: give q as the top-k law of this many candidates instead of dense rows.
    """

    info = ComponentInfo("test.dense", law=DraftLaw.DENSE, default_width=3)

    def __init__(self, laws: Any, candidates: int = 0) -> None:
        self._laws = mx.array(np.asarray(laws, dtype=np.float32))
        self._candidates = candidates
        self._seen = 0

    def open(self, request: DraftRequest) -> DenseDrafter:
        """Begin a generation."""
        self._seen = 0
        return self

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Count."""
        self._seen += len(committed[0])

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """Draw from the rows of the next positions."""
        index = (mx.arange(width) + self._seen) % self._laws.shape[0]
        law = self._laws[index][None]
        if not self._candidates:
            drawn = mx.random.categorical(mx.log(law), key=sampling.draft_key())
            return Draft(drawn.astype(mx.int32), DraftLaw.DENSE, law)
        ids = mx.argsort(-law, axis=-1)[..., : self._candidates]
        q = mx.take_along_axis(law, ids, axis=-1)
        q = q / q.sum(axis=-1, keepdims=True)
        slot = mx.random.categorical(mx.log(q), key=sampling.draft_key())
        tokens = mx.take_along_axis(ids, slot[..., None], axis=-1)[..., 0]
        return Draft(tokens.astype(mx.int32), DraftLaw.TOP_K, q, ids.astype(mx.int32))
