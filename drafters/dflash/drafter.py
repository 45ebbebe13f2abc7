"""The DFlash drafter: all draft slots of a block are filled in one pass."""

from __future__ import annotations

import mlx.core as mx

from draftloom.contracts import ComponentInfo, Draft, DraftLaw, DraftRequest, Need
from draftloom.sampling import SamplingState

from .base import BlockDrafter, BlockSession

__all__ = ["DFlashDrafter"]


class DFlashDrafter(BlockDrafter):
    """Block-diffusion drafting from a checkpoint of any format.

    Draft tokens are the most likely of each slot also when the target samples: the slots are
    predicted independently of one another, so that drawing from each would agree with the target
    far less often.

    Args:
        checkpoint: its description, or a folder of a built-in format.
        bits, group_size, window, sinks: see `BlockOptions.of`.

    Attributes:
        description: of the checkpoint.

    Raises:
        ModelError: the folder is not a DFlash checkpoint, or its config is incomplete.
        UsageError: an option out of its range.
    """

    info = ComponentInfo(
        "dflash",
        "block diffusion over the target's hidden states",
        needs=(Need.TAPS,),
        law=DraftLaw.DETERMINISTIC,
        model_options=("checkpoint",),
        checkpoint_options=("checkpoint",),
        paired=("dflash",),
    )
    serves = "dflash"

    def open(self, request: DraftRequest) -> DFlashSession:
        """Begin a generation.

        Raises:
            ModelError: the drafter was not bound.
        """
        return DFlashSession(self._weights())


class DFlashSession(BlockSession):
    """One generation: a context, and the most likely token of every slot."""

    def _propose(self, anchor: mx.array, width: int, count: int, sampling: SamplingState) -> Draft:
        """`count` tokens [B, count] after the anchor [B],
        from one pass over [anchor, MASK ..] with `width` slots."""
        hidden = self._context.hidden(anchor, width, count)
        logits = self._loaded.logits(hidden)
        # A soft cap keeps the order of logits, so that the argmax needs none.
        tokens = mx.argmax(logits, axis=-1)
        top = mx.take_along_axis(logits, tokens[..., None], axis=-1)
        healthy = mx.isfinite(hidden).all(axis=(1, 2)) & mx.isfinite(top).all(axis=(1, 2))
        return Draft.deterministic(self._loaded.to_target(tokens), healthy, source="dflash")
