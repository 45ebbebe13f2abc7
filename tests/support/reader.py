"""A drafter that lives by the hidden states: it knows what the target's text was where they looked
like this. A stand-in for a trained drafter, whose acceptance falls when it is fed other states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import mlx.core as mx
import numpy as np

from draftloom.contracts import ComponentInfo, Draft, DraftLaw, DraftRequest, Need, TargetAdapter
from draftloom.sampling import SamplingState

__all__ = ["FeatureReader", "Library", "make_library"]


HIDDEN = 1024


@attrs.frozen(eq=False)
class Library:
    """What a small network makes of a target's hidden states: what follows them in its own texts.

    Attributes:
        inner: [F + 1, H], drawn at random.
        outer: [H, W * V], fitted.
        width: W, slots.
    """

    inner: np.ndarray
    outer: np.ndarray
    width: int

    def draft(self, state: np.ndarray) -> np.ndarray:
        """The likeliest token of each slot [W] after a state [F]."""
        scores = _lift(state[None], self.inner) @ self.outer
        best: np.ndarray = scores.reshape(self.width, -1).argmax(axis=1)
        return best


def _lift(states: np.ndarray, inner: np.ndarray) -> np.ndarray:
    scaled = states / np.sqrt((states**2).mean(axis=1, keepdims=True))
    lifted: np.ndarray = np.maximum(
        np.concatenate([scaled, np.ones((len(states), 1))], axis=1) @ inner, 0
    )
    return lifted


def make_library(
    target: TargetAdapter, texts: Sequence[Sequence[int]], layer: int, width: int
) -> Library:
    """Run texts through a target, and fit what follows to what a layer gave at each position."""
    states, following = [], []
    target.tap((layer,))
    for text in texts:
        features = target.forward(mx.array([list(text)]), target.make_cache()).features
        rows = np.array(features)[0]
        for i in range(len(text) - width - 1):
            states.append(rows[i])
            following.append(text[i + 2 : i + 2 + width])
    target.tap(())
    rng = np.random.default_rng(9)
    inner = rng.standard_normal((len(states[0]) + 1, HIDDEN)) / np.sqrt(len(states[0]))
    wanted = np.eye(target.info.vocab_size)[np.array(following)].reshape(len(states), -1)
    outer = np.linalg.lstsq(_lift(np.stack(states), inner), wanted, rcond=None)[0]
    return Library(inner, outer, width)


class FeatureReader:
    """Drafts what the hidden state of the last committed token says.

    Args:
        library: fitted on the target it belongs to.
        layer: the layer it reads.
        length: acceptance length it claims.
    """

    info = ComponentInfo("test.reader", law=DraftLaw.DETERMINISTIC)

    def __init__(self, library: Any, layer: int, length: float | None = None) -> None:
        self._library: Library = library
        self._last: np.ndarray | None = None
        self.info = ComponentInfo(
            "test.reader",
            needs=(Need.TAPS,),
            law=DraftLaw.DETERMINISTIC,
            tap_layers=(layer,),
            default_width=3,
            paired=("test.reader",),
            stated_length=length,
        )

    def open(self, request: DraftRequest) -> FeatureReader:
        """Begin a generation."""
        self._last = None
        return self

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Keep the newest state."""
        assert features is not None
        self._last = np.array(features)[0, len(committed[0]) - 1]

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """What follows the newest state."""
        assert self._last is not None
        return Draft.deterministic(mx.array(self._library.draft(self._last)[None, :width]))
