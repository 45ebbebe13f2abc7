"""Which sequences and which anchors a step trains on. Everything follows from seed and step, so
that a resumed run goes on with the very same batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import mlx.core as mx

from .data import Packed
from .settings import TrainSettings
from .step import BlockBatch

__all__ = ["Batches", "Features"]

Features = Callable[[Sequence[int]], tuple[mx.array, mx.array | None]]
"""Sequence numbers -> features [R, S, F], padded to the longest, and logits [R, S, V] or None."""


class Batches:
    """The stream of batches.

    Args:
        sequences: all of them.
        features: where their features come from.
        settings: batch, anchors, seed.
        slots: K, draft slots of a block.
    """

    def __init__(
        self,
        sequences: Sequence[Packed],
        features: Features,
        settings: TrainSettings,
        slots: int,
    ) -> None:
        self._sequences, self._features = sequences, features
        self._settings, self._slots = settings, slots
        self._candidates = [s.anchors() for s in sequences]
        self._order: tuple[int, list[int]] = (-1, [])

    def chosen(self, index: int) -> tuple[list[int], list[list[int]]]:
        """Sequence numbers of batch `index`, and the anchors of each."""
        size, total = self._settings.batch, len(self._sequences)
        picks = [divmod(n, total) for n in range(index * size, (index + 1) * size)]
        numbers, anchors = [], []
        for epoch, place in picks:
            number = self._permutation(epoch)[place]
            candidates = self._candidates[number]
            stream = random.Random(f"{self._settings.seed}/anchors/{epoch}/{number}")
            count = min(self._settings.anchors, len(candidates))
            numbers.append(number)
            anchors.append(sorted(stream.sample(candidates, count)))
        return numbers, anchors

    def _permutation(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self._sequences)))
            random.Random(f"{self._settings.seed}/order/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def batch(self, index: int) -> tuple[BlockBatch, int]:
        """Batch `index`, from 0, and its context tokens."""
        numbers, anchors = self.chosen(index)
        rows = [self._sequences[n] for n in numbers]
        widest = max(map(len, anchors))
        places, first, labels, valid = [], [], [], []
        for row, positions in zip(rows, anchors, strict=True):
            padding = widest - len(positions)  # blocks that count nothing
            places.append([*positions, *[1] * padding])
            first.append([row.tokens[p] for p in places[-1]])
            found = [labels_after(row, p, self._slots) for p in positions]
            nothing = ([0] * self._slots, [0.0] * self._slots)
            labels.append([f[0] for f in found] + [nothing[0]] * padding)
            valid.append([f[1] for f in found] + [nothing[1]] * padding)
        features, logits = self._features(numbers)
        where = mx.array(places, dtype=mx.int32)
        batch = BlockBatch(
            features=features,
            anchors=where,
            anchor_tokens=mx.array(first, dtype=mx.int32),
            labels=mx.array(labels, dtype=mx.int32),
            valid=mx.array(valid, dtype=mx.float32),
            teacher=None if logits is None else _teacher(logits, where, self._slots),
        )
        return batch, sum(len(row.tokens) for row in rows)


def labels_after(row: Packed, anchor: int, slots: int) -> tuple[list[int], list[float]]:
    """The `slots` tokens after an anchor, and 1.0 for those that count: up to the first that is
    not trained on, of another document, or past the end."""
    labels, valid, good = [], [], True
    for p in range(anchor + 1, anchor + 1 + slots):
        inside = p < len(row.tokens)
        good = good and inside and row.trained[p] and row.segments[p] == row.segments[anchor]
        labels.append(row.tokens[p] if inside else 0)
        valid.append(float(good))
    return labels, valid


def _teacher(logits: mx.array, anchors: mx.array, slots: int) -> mx.array:
    """[R, N, K, V]: row p of the logits is the law of token p + 1."""
    rows, blocks = anchors.shape
    where = (anchors[..., None] + mx.arange(slots)).reshape(rows, -1, 1)
    where = mx.minimum(where, logits.shape[1] - 1)
    return mx.take_along_axis(logits, where, axis=1).reshape(rows, blocks, slots, -1)
