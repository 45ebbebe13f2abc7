"""Which keys a query sees when all blocks of a sequence train in one pass.

Keys are [S context rows | N * T block rows], queries the N * T block rows:

                 context (S)            block 0   block 1   block 2
    block 0   1 1 1 . . . . . . . .     1 1 1 1   . . . .   . . . .    anchor_0 = 3
    block 1   1 1 1 1 1 1 . . . . .     . . . .   1 1 1 1   . . . .    anchor_1 = 6
    block 2   1 1 1 1 1 1 1 1 1 . .     . . . .   . . . .   1 1 1 1    anchor_2 = 9
"""

from __future__ import annotations

import mlx.core as mx

__all__ = ["block_mask"]


def block_mask(
    anchors: mx.array, context: int, block: int, *, causal: bool, window: int | None
) -> mx.array:
    """The mask of one layer.

    Args:
        anchors: [R, N] int32, absolute position of each block's anchor.
        context: S, context rows of a sequence.
        block: T, tokens of a block.
        causal: whether a block is causal inside.
        window: W of a sliding layer: context is seen iff query - key < W. None is all of it.

    Returns:
        [R, 1, N*T, S + N*T] bool. Block j sees context before anchor_j, and itself.
    """
    rows, blocks = anchors.shape
    slot = mx.arange(block)
    query = (anchors[:, :, None] + slot).reshape(rows, blocks * block, 1)
    begin = mx.repeat(anchors, block, axis=1)[:, :, None]
    key = mx.arange(context)[None, None]
    seen = key < begin
    if window is not None:
        seen = seen & (query - key < window)
    owner, inner = mx.repeat(mx.arange(blocks), block), mx.tile(slot, [blocks])
    own = owner[:, None] == owner[None]
    if causal:
        own = own & (inner[None] <= inner[:, None])
    own = mx.broadcast_to(own[None], (rows, *own.shape))
    return mx.concatenate([seen, own], axis=-1)[:, None]
