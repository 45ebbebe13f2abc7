"""The DFlash drafter: all draft slots of a block are filled in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import mlx.core as mx

from draftloom.checkpoint import DrafterDescription
from draftloom.contracts import (
    BindContext,
    ComponentInfo,
    Draft,
    DraftLaw,
    DraftRequest,
    Need,
    TargetInfo,
)
from draftloom.errors import ModelError, Problem
from draftloom.sampling import SamplingState

from .block import (
    BlockContext,
    BlockOptions,
    LoadedDrafter,
    context_bytes,
    described,
    load_drafter,
    with_taps,
)
from .model import DFlashModel

__all__ = ["DFlashDrafter"]


class DFlashDrafter:
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

    def __init__(
        self,
        checkpoint: Path | DrafterDescription,
        bits: int | None = None,
        group_size: int | None = None,
        window: int | None = None,
        sinks: int | None = None,
    ) -> None:
        self.description = described(checkpoint, "dflash")
        trained = self.description.trained_context
        self._options = BlockOptions.of(bits, group_size, window, sinks, trained)
        details = self._options.describe(DFlashModel(self.description))
        self.info = with_taps(type(self).info, self.description, details)
        self._loaded: LoadedDrafter | None = None

    def check(self, target: TargetInfo) -> Iterable[Problem]:
        """What of the checkpoint does not fit the target, or the options."""
        yield from self.description.problems(target)
        yield from self._options.problems(DFlashModel(self.description), self.info.name)

    def bind(self, context: BindContext) -> None:
        """Load the weights, in the type that the target computes in, and pack them if asked to.

        Raises:
            ModelError: weights missing, corrupt, or not fitting the config; names the tensor.
        """
        self._loaded = load_drafter(self.description, context, options=self._options)

    def memory(self) -> dict[str, int]:
        """Bytes of the weights; nothing before they are loaded."""
        return {} if self._loaded is None else self._loaded.memory()

    def context_bytes(self, tokens: int) -> int:
        """Bytes that a session holds for so many tokens."""
        return context_bytes(self.description, self._options, self._loaded, tokens)

    def open(self, request: DraftRequest) -> DFlashSession:
        """Begin a generation.

        Raises:
            ModelError: the drafter was not bound.
        """
        if self._loaded is None:
            raise ModelError("the dflash drafter has no weights", "build the pipeline first")
        return DFlashSession(self._loaded)


class DFlashSession:
    """One generation: a context, and the most likely token of every slot."""

    def __init__(self, loaded: LoadedDrafter) -> None:
        self._loaded = loaded
        self._context = BlockContext(loaded)

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Take in the features [B, T, F] of committed tokens.

        Raises:
            ValueError: no features, or rows of different lengths.
        """
        self._context.observe(committed, features)

    def memory(self) -> dict[str, int]:
        """Bytes of the context."""
        return self._context.memory()

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """`width` tokens [B, width] after the anchor [B], from one pass over [anchor, MASK ..]."""
        hidden = self._context.hidden(anchor, width)
        logits = self._loaded.logits(hidden)
        # A soft cap keeps the order of logits, so that the argmax needs none.
        tokens = mx.argmax(logits, axis=-1)
        top = mx.take_along_axis(logits, tokens[..., None], axis=-1)
        healthy = mx.isfinite(hidden).all(axis=(1, 2)) & mx.isfinite(top).all(axis=(1, 2))
        return Draft.deterministic(self._loaded.to_target(tokens), healthy, source="dflash")
