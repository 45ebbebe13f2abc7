"""The context of a drafter: keys and values of committed positions, all of them or a window.

A layer keeps the first few positions (sinks) and the last ones. Those lie in a ring: position p is
in row S + (p - S) mod N, so that a new position takes the place of the one that is never seen
again, and nothing is moved. Keys carry their absolute positions (they are rotated before they are
stored), so that the order of the rows is of no matter to attention.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import mlx.core as mx

from draftloom.errors import UsageError
from draftloom.row_writes import LEAST_ROWS, traced_rows

__all__ = ["ContextCache", "ContextWindow"]

DEFAULT_WINDOW = 4096
DEFAULT_SINKS = 64
STEP = 256
"""Rows that a buffer grows by."""
NOWHERE = 2**30
"""The position of a row that holds nothing: after every query."""


@attrs.frozen
class ContextWindow:
    """Which committed positions the layers of a drafter keep.

    Attributes:
        window: the last positions; 0 keeps all.
        sinks: the first positions, kept beside them by layers without a window of their own.

    Raises:
        UsageError: a value out of its range, or sinks beside a context that is kept whole.
    """

    window: int = DEFAULT_WINDOW
    sinks: int = DEFAULT_SINKS

    def __attrs_post_init__(self) -> None:
        for name in ("window", "sinks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UsageError(
                    f"the drafter's {name} must be a whole number >= 0, got {value!r}",
                    "window 0 keeps the whole context",
                )

    @classmethod
    def of(cls, window: int | None, sinks: int | None, trained: int | None = None) -> ContextWindow:
        """The window that two options ask for; None is the default: what the drafter was trained
        on, or 4096 where nothing states that, and 64 sinks.

        Raises:
            UsageError: see the class; sinks are given for a context that is kept whole.
        """
        if window == 0:
            if sinks:
                raise UsageError(
                    f"the drafter's sinks are {sinks}, and its window keeps the whole context",
                    "give a window above 0, or leave sinks out",
                )
            return cls(0, 0)
        if window is None:
            window = DEFAULT_WINDOW if trained is None else trained
        return cls(window, DEFAULT_SINKS if sinks is None else sinks)

    def cache(self, own: int | None) -> ContextCache:
        """An empty cache of one layer.

        Args:
            own: how many of the last positions the layer ever sees, by a window that it was
                trained with; None is all. Such a layer has no sinks: it never saw any.
        """
        if own is not None:
            return ContextCache(0, own if not self.window else min(own, self.window))
        return ContextCache(self.sinks, self.window) if self.window else ContextCache()

    def describe(self) -> str:
        """The window for people."""
        if not self.window:
            return "context of all positions"
        sinks = f"the first {self.sinks} and " if self.sinks else ""
        return f"context of {sinks}the last {self.window} positions"


class ContextCache:
    """Keys and values of one layer.

    Args:
        sinks: S, first positions that are kept.
        window: N, last positions that are kept; None keeps every position.

    Attributes:
        limit: most positions kept; None is no limit.
        offset: committed positions so far, kept or not.
        arrays: the buffers of keys and values, [B, heads, rows, size] each; none while empty. Rows
            from `held` on are free.
    """

    def __init__(self, sinks: int = 0, window: int | None = None) -> None:
        self.sinks, self.window = sinks, window
        self.limit = None if window is None else sinks + window
        self.offset = 0
        self._widest = 0  # rows of a block so far: they stand behind a full context
        self.arrays: list[mx.array] = []

    @property
    def held(self) -> int:
        """Positions kept now: those are the first rows of the buffers."""
        return self.offset if self.limit is None else min(self.offset, self.limit)

    @property
    def rows(self) -> int:
        """Rows that the buffers have."""
        return self.arrays[0].shape[2] if self.arrays else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.arrays)

    def spans(self, tokens: int) -> list[tuple[int, int]]:
        """Which of the next `tokens` positions will be kept: [start, stop) counted from the first
        of them, in order."""
        if self.window is None:
            return [(0, tokens)] if tokens else []
        head = min(max(self.sinks - self.offset, 0), tokens)
        tail = max(tokens - self.window, 0)
        if head >= tail:
            return [(0, tokens)] if tokens else []
        return [span for span in ((0, head), (tail, tokens)) if span[0] < span[1]]

    def put(self, start: int, keys: mx.array, values: mx.array) -> None:
        """Store keys and values [B, heads, T, size] of the positions from `start` on. They are
        counted by `advance`, once all spans are stored."""
        stop = start + keys.shape[2]
        self._room(stop if self.limit is None else min(stop, self.limit), keys, values)
        for position, row, count in self._pieces(start, stop):
            piece = slice(position - start, position - start + count)
            self._write(row, keys[..., piece, :], values[..., piece, :])

    def advance(self, tokens: int) -> None:
        """Count positions, kept or not."""
        self.offset += tokens

    def with_block(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The context's keys and values with those of a block [B, heads, T, size] behind them, in
        rows that stay free: the next block or position takes them."""
        end = self.held + keys.shape[2]
        self._widest = max(self._widest, keys.shape[2])
        self._room(end, keys, values)
        self._write(self.held, keys, values)
        stored_keys, stored_values = self.arrays
        return stored_keys[..., :end, :], stored_values[..., :end, :]

    def reserve(self, tokens: int) -> None:
        """Make room for a block of so many tokens behind a context that is not empty. Whoever asks
        traces each length anew: see `traced_rows`."""
        rows, limit = self.arrays[0].shape[2], self.limit
        needed = tokens + (self.offset if limit is None or self.offset < limit else limit)
        if needed <= rows >= LEAST_ROWS and tokens <= self._widest:
            return  # as nearly always: this runs for every layer in every cycle
        self._widest = max(self._widest, tokens)
        rows = traced_rows(rows, needed)
        if self.limit is not None:
            rows = max(needed, min(rows, self.limit + tokens))
        self._room(rows, *self.arrays)

    def positions(self, tokens: int, length: int) -> mx.array:
        """Absolute positions [length] int32 of the first rows while a block of `tokens` stands
        behind the context; what holds nothing is after every query."""
        row = mx.arange(length)
        position = row
        if self.limit is not None and self.offset > self.limit:
            assert self.window is not None
            last = self.offset - 1
            in_ring = last - (last - row) % max(self.window, 1)
            position = mx.where(row < self.sinks, row, in_ring)
        position = mx.where(row < self.held, position, row - self.held + self.offset)
        return mx.where(row < self.held + tokens, position, NOWHERE)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(position, row, count) of runs whose rows lie side by side."""
        limit, position = self.limit, start
        while position < stop:
            row, count = position, stop - position
            if limit is not None and position >= limit:
                assert self.window
                row = self.sinks + (position - self.sinks) % self.window
            if limit is not None:
                count = min(count, limit - row)
            yield position, row, count
            position += count

    def _write(self, row: int, *pair: mx.array) -> None:
        for buffer, rows in zip(self.arrays, pair, strict=True):
            buffer[..., row : row + rows.shape[2], :] = rows

    def _room(self, rows: int, *pair: mx.array) -> None:
        """Make the buffers at least so long: by steps, up to the most that will ever be needed."""
        if rows <= self.rows:
            return
        wanted = -(-rows // STEP) * STEP
        if self.limit is not None:
            wanted = max(rows, min(wanted, self.limit + self._widest))
        shapes = [(*like.shape[:2], wanted - self.rows, like.shape[3]) for like in pair]
        free = [mx.zeros(shape, dtype=pair[0].dtype) for shape in shapes]
        if self.arrays:
            both = zip(self.arrays, free, strict=True)
            free = [mx.concatenate([*parts], axis=2) for parts in both]
        self.arrays = free
