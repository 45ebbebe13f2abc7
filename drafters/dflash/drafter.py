"""The DFlash drafter: all draft slots of a block are filled in one pass."""

from __future__ import annotations

import mlx.core as mx

from draftloom.contracts import ComponentInfo, Draft, DraftLaw, DraftRequest, Need
from draftloom.drafting import all_finite
from draftloom.sampling import SamplingState

from .base import BlockDrafter, BlockSession
from .block import LoadedDrafter

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

    def __init__(self, loaded: LoadedDrafter) -> None:
        super().__init__(loaded)
        self.ahead = loaded.compiled is not None and loaded.compiled.ahead
        self._ahead: tuple[int, int, Draft] | None = None

    def _propose(self, anchor: mx.array, width: int, count: int, sampling: SamplingState) -> Draft:
        """`count` tokens [B, count] after the anchor [B],
        from one pass over [anchor, MASK ..] with `width` slots."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == width and ahead[1] >= count:
            return ahead[2].first(count)
        return self._drafted(self._context.hidden(anchor, width, count))

    def propose_ahead(
        self, features: mx.array, kept: mx.array, anchor: mx.array, width: int, count: int
    ) -> mx.array | None:
        """See `draftloom.abilities.DraftsAhead`."""
        hidden = self._context.hidden_ahead(features, kept, anchor, width, count)
        if hidden is None:
            return None
        draft = self._drafted(hidden)
        self._ahead = width, count, draft
        return draft.tokens

    def _drafted(self, hidden: mx.array) -> Draft:
        logits = self._loaded.logits(hidden)
        # A soft cap keeps the order of logits, so that the argmax needs none.
        tokens = mx.argmax(logits, axis=-1)
        top = mx.take_along_axis(logits, tokens[..., None], axis=-1)
        loaded = self._loaded
        return Draft.deterministic(
            loaded.to_target(tokens),
            all_finite(hidden, top),
            source="dflash",
            ids_below=loaded.ids_below(logits),
        )
