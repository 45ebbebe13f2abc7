"""Buffers of keys or values in traced passes: how long they are, and writing rows where only the
device knows where they go."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from draftloom.device import on_cuda

__all__ = ["LEAST_ROWS", "MOST_ROWS", "traced_rows", "write_rows"]

LEAST_ROWS, MOST_ROWS = 1024, 2048
"""Rows that a buffer has, and grows by, at least and at most, where each length costs a trace."""


def traced_rows(held: int, needed: int, step: int = 1) -> int:
    """Rows that a buffer of `held` rows is to have for `needed`: it begins with `LEAST_ROWS` and
    grows by as much as it has (whole steps), up to `MOST_ROWS`."""
    if needed <= held >= LEAST_ROWS:
        return held
    more = min(max(step, LEAST_ROWS, held // step * step), MOST_ROWS)
    return -(-needed // more) * more


def write_rows(buffer: mx.array, rows: mx.array, offset: mx.array) -> mx.array:
    """A buffer [B, H, N, D] with rows [B, H, T, D] written from row `offset` (int32) on.

    Whoever holds no other reference to the buffer has it written where it lies.
    """
    if not on_cuda():
        return mx.slice_update(buffer, rows, offset.reshape(1), axes=(2,))
    # There an update at an offset reads it from host memory, in every threadgroup of a copy.
    place = offset + _steps(rows.shape[2])
    index = mx.broadcast_to(place[None, None, :, None], rows.shape)
    return mx.put_along_axis(buffer, index, rows, axis=2)


@lru_cache(maxsize=64)
def _steps(rows: int) -> mx.array:
    """0 .. rows - 1, int32: one array for all who trace. `mx.compile` makes one node of what is
    done to the same array alike; with an `mx.arange` of its own every write would be two launches
    more."""
    steps = mx.arange(rows, dtype=mx.int32)
    mx.eval(steps)
    return steps
