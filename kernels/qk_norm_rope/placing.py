"""What queries and keys are read from, and where they are put."""

from __future__ import annotations

from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn

__all__ = ["Heads", "Rotation"]


@attrs.frozen
class Heads:
    """Where queries and keys lie in a row of a packed product: the heads of q, then those of k,
    then whatever else there is.

    Attributes:
        queries: Hq.
        keys: Hk.
        size: D, numbers of a head.
        step: numbers from one head of q to the next; more than D where a gate lies between.
    """

    queries: int
    keys: int
    size: int
    step: int

    @property
    def ends(self) -> tuple[int, int]:
        """Where q ends in a row, and where k does."""
        end = self.queries * self.step
        return end, end + self.keys * self.size


class Rotation:
    """A rotary embedding from one position on, for all layers that have the same.

    Args:
        rope: the module.
        offset: the position of the first token: a number, or int32 without axes.
    """

    def __init__(self, rope: Any, offset: int | mx.array) -> None:
        self.rope = rope
        self.offset = offset
        self._tables: dict[int, mx.array] = {}

    @property
    def plain(self) -> bool:
        """Whether it is what `table` says: a base and a scale, and nothing else."""
        return type(self.rope) is nn.RoPE

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, H, T, D] rotated, by the module."""
        rotated: mx.array = self.rope(x, offset=self.offset)
        return rotated

    def table(self, tokens: int) -> mx.array:
        """[T, R] float32: the R / 2 cosines of each position, then its sines. Made once."""
        found = self._tables.get(tokens)
        if found is None:
            half = self.rope.dims // 2
            frequencies = self.rope.base ** (-mx.arange(half, dtype=mx.float32) / half)
            places = (mx.arange(tokens, dtype=mx.int32) + self.offset).astype(mx.float32)
            angles = self.rope.scale * places[:, None] * frequencies
            found = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
            self._tables[tokens] = found
        return found
