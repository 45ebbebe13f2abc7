"""Which keys a query sees when all blocks of a sequence train in one pass.

A query sees context before its block's anchor, and its own block; no other block:

                 context (S)            block 0   block 1   block 2
    block 0   1 1 1 . . . . . . . .     1 1 1 1   . . . .   . . . .    anchor_0 = 3
    block 1   1 1 1 1 1 1 . . . . .     . . . .   1 1 1 1   . . . .    anchor_1 = 6
    block 2   1 1 1 1 1 1 1 1 1 . .     . . . .   . . . .   1 1 1 1    anchor_2 = 9

The keys of other blocks are never even computed: a query has S + T keys, not S + N * T.
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
        [R, N, T, S + T] bool, over [context | own block].
    """
    rows, blocks = anchors.shape
    slot = mx.arange(block)
    begin = anchors[:, :, None, None]
    key = mx.arange(context)
    seen = mx.broadcast_to(key < begin, (rows, blocks, block, context))
    if window is not None:
        seen = seen & (begin + slot[:, None] - key < window)
    own = slot[None] <= slot[:, None] if causal else mx.ones((block, block), dtype=mx.bool_)
    own = mx.broadcast_to(own, (rows, blocks, block, block))
    return mx.concatenate([seen, own], axis=-1)
