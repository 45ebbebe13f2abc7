"""Writing rows into a buffer of keys or values where only the device knows where they go."""

from __future__ import annotations

import mlx.core as mx

from draftloom.device import on_cuda

__all__ = ["write_rows"]


def write_rows(buffer: mx.array, rows: mx.array, offset: mx.array) -> mx.array:
    """A buffer [B, H, N, D] with rows [B, H, T, D] written from row `offset` (int32) on.

    Whoever holds no other reference to the buffer has it written where it lies.
    """
    if not on_cuda():
        return mx.slice_update(buffer, rows, offset.reshape(1), axes=(2,))
    # There an update at an offset reads it from host memory, in every threadgroup of a copy.
    place = offset + mx.arange(rows.shape[2])
    index = mx.broadcast_to(place[None, None, :, None], rows.shape)
    return mx.put_along_axis(buffer, index, rows, axis=2)
