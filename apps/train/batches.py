"""Which sequences and which anchors a step trains on. Everything follows from seed and step, so
that a resumed run goes on with the very same batches.

Tokens lie in one array on the device, and batches are cut out of it there: no Python loop runs over
tokens or blocks.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from .document import Packed
from .settings import TrainSettings
from .step import BlockBatch

__all__ = ["Batches", "Features"]

_AT_ONCE = 4096

Features = Callable[[Sequence[int]], tuple[mx.array, mx.array | None]]
"""Sequence numbers -> features [R, S, F], padded to the longest, and logits [R, S, V] or None."""


class Batches:
    """The stream of batches.

    Args:
        sequences: all of them.
        features: where their features come from.
        settings: batch, anchors, seed, and whether all batches have the same shape (compile).
        slots: K, draft slots of a block.
        part: (r, N), where N processes share a batch of N times the size: the r-th part of it is
            cut out here. What is drawn does not depend on N, but on the size of the whole.
    """

    def __init__(
        self,
        sequences: Sequence[Packed],
        features: Features,
        settings: TrainSettings,
        slots: int,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self._features, self._settings, self._slots = features, settings, slots
        self._size = settings.batch * part[1]
        self._own = slice(settings.batch * part[0], settings.batch * (part[0] + 1))
        self._lengths = [len(s) for s in sequences]
        self._offsets = [0]
        for length in self._lengths:
            self._offsets.append(self._offsets[-1] + length)
        self._tokens = mx.array(np.concatenate([s.ids for s in sequences]))
        self._counts: list[int] = []
        runs = np.empty(self._offsets[-1], dtype=np.uint8 if slots < 256 else np.int32)
        for begin in range(0, len(sequences), _AT_ONCE):  # little is copied at once
            offsets = self._offsets[begin : begin + _AT_ONCE + 1]
            of_these, counts = _runs(sequences[begin : begin + _AT_ONCE], slots)
            runs[offsets[0] : offsets[-1]] = of_these
            self._counts += counts
        self._runs = mx.array(runs)
        self._most, self._longest = max(self._counts), max(self._lengths)
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self._offsets[-1]

    def numbers(self, index: int) -> list[int]:
        """Sequence numbers of batch `index`, of all processes together."""
        size, total = self._size, len(self._lengths)
        picks = [divmod(n, total) for n in range(index * size, (index + 1) * size)]
        return [self._permutation(epoch)[place] for epoch, place in picks]

    def _permutation(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self._lengths)))
            random.Random(f"{self._settings.seed}/order/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def batch(self, index: int) -> tuple[BlockBatch, int]:
        """This process's part of batch `index`, from 0, and the context tokens of the whole batch.

        Blocks past a sequence's own count nothing.
        """
        numbers = self.numbers(index)
        most, width = self._most, self._longest
        if not self._settings.compile:
            most = max(self._counts[n] for n in numbers)
            width = max(self._lengths[n] for n in numbers)
        blocks = min(self._settings.anchors, most)
        digest = hashlib.sha256(f"{self._settings.seed}/anchors/{index}".encode()).digest()
        key = mx.random.key(int.from_bytes(digest[:8], "big"))
        seen = sum(self._lengths[n] for n in numbers)
        numbers = numbers[self._own]
        begins = mx.array([self._offsets[n] for n in numbers], dtype=mx.int32)[:, None]
        lengths = mx.array([self._lengths[n] for n in numbers], dtype=mx.int32)[:, None]
        counts = mx.array([self._counts[n] for n in numbers], dtype=mx.int32)[:, None]

        place = mx.arange(width + self._slots)
        where = mx.minimum(begins + place, self.tokens - 1)
        tokens = mx.where(place < lengths, self._tokens[where], 0)
        runs = mx.where(place < lengths, self._runs[where].astype(mx.int32), 0)

        # Of the whole batch, so that a process draws what one process alone would.
        draws = mx.random.uniform(shape=(self._size, runs.shape[1]), key=key)[self._own]
        drawn = mx.where(runs > 0, draws, 2.0)
        anchors = mx.argsort(drawn, axis=1)[:, :blocks].astype(mx.int32)
        counted = mx.arange(blocks) < counts
        anchors = mx.sort(mx.where(counted, anchors, width), axis=1)
        anchors = mx.where(counted, anchors, 1)

        after = anchors[..., None] + mx.arange(1, self._slots + 1)
        labels = mx.take_along_axis(tokens, after.reshape(len(numbers), -1), axis=1)
        reach = mx.where(counted, mx.take_along_axis(runs, anchors, axis=1), 0)
        features, logits = self._features(numbers)
        batch = BlockBatch(
            features=features,
            anchors=anchors,
            anchor_tokens=mx.take_along_axis(tokens, anchors, axis=1),
            labels=labels.reshape(after.shape),
            valid=(mx.arange(self._slots) < reach[..., None]).astype(mx.float32),
            teacher=None if logits is None else _teacher(logits, anchors, self._slots),
        )
        return batch, seen


def _runs(sequences: Sequence[Packed], slots: int) -> tuple[np.ndarray, list[int]]:
    """[tokens] int32: how many of the next K tokens a block that begins here learns; 0 where none
    can begin. And how many blocks can begin in each sequence.

    A block begins at a trained token with another before it. It learns up to the first token that
    is not trained on, or of another document, or past the end.
    """
    trained = np.concatenate([s.mask for s in sequences])
    segments = np.concatenate([s.numbers for s in sequences])
    total = len(trained)
    begins = np.cumsum([0, *(len(s) for s in sequences[:-1])])
    stops = ~trained
    stops[1:] |= segments[1:] != segments[:-1]
    stops[begins] = True
    # The next stop after each token, from the end on.
    places = np.arange(total, dtype=np.int32)
    following = np.full(total, total, dtype=np.int32)
    np.copyto(following[:-1], places[1:], where=stops[1:])
    backwards = following[::-1]
    np.minimum.accumulate(backwards, out=backwards)
    runs = np.minimum(following - places - 1, slots)
    trained[begins] = False
    runs *= trained
    counts: list[int] = np.add.reduceat(runs > 0, begins, dtype=np.int32).tolist()
    return runs, counts


def _teacher(logits: mx.array, anchors: mx.array, slots: int) -> mx.array:
    """[R, N, K, V]: row p of the logits is the law of token p + 1."""
    rows, blocks = anchors.shape
    where = (anchors[..., None] + mx.arange(slots)).reshape(rows, -1, 1)
    where = mx.minimum(where, logits.shape[1] - 1)
    return mx.take_along_axis(logits, where, axis=1).reshape(rows, blocks, slots, -1)
