"""What drafters of blocks have in common: a checkpoint, its options and weights, a context.

A drafter adds the network it runs and the session that proposes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import attrs
import mlx.core as mx

from draftloom.abilities import BindContext
from draftloom.checkpoint import DrafterDescription
from draftloom.contracts import ComponentInfo, Draft, TargetInfo
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

__all__ = ["BlockDrafter", "BlockSession"]


class BlockDrafter:
    """A drafter that reads a checkpoint of any format.

    Args:
        checkpoint: its description, or a folder of a built-in format.
        bits, group_size, window, sinks: see `BlockOptions.of`.

    Attributes:
        description: of the checkpoint.
        serves: the name that formats give checkpoints of this kind; a subclass keeps it under
            another name of its own.
        network: what the weights belong to.

    Raises:
        ModelError: the folder is not a checkpoint for this drafter, or its config is incomplete or
            does not fit together.
        UsageError: an option out of its range.
    """

    info: ComponentInfo
    serves: ClassVar[str]
    network: ClassVar[type[DFlashModel]] = DFlashModel

    def __init__(
        self,
        checkpoint: Path | DrafterDescription,
        bits: int | None = None,
        group_size: int | None = None,
        window: int | None = None,
        sinks: int | None = None,
    ) -> None:
        self.description = described(checkpoint, self.serves)
        trained = self.description.trained_context
        self._options = BlockOptions.of(bits, group_size, window, sinks, trained)
        self._tell(self._options.describe(self.network(self.description)))
        self._loaded: LoadedDrafter | None = None

    def _tell(self, details: str) -> None:
        """Say `details` in the `info` of this drafter."""
        self.info = with_taps(type(self).info, self.description, details)

    def check(self, target: TargetInfo) -> Iterable[Problem]:
        """What of the checkpoint does not fit the target, or the options."""
        yield from self.description.problems(target)
        yield from self._options.problems(self.network(self.description), self.info.name)

    def bind(self, context: BindContext) -> None:
        """Load the weights, in the type that the target computes in, and pack them if asked to.

        Raises:
            ModelError: weights missing, corrupt, or not fitting the config; names the tensor.
        """
        self._loaded = load_drafter(self.description, context, self.network, self._options)

    def memory(self) -> dict[str, int]:
        """Bytes of the weights; nothing before they are loaded."""
        return {} if self._loaded is None else self._loaded.memory()

    def context_bytes(self, tokens: int) -> int:
        """Bytes that a session holds for so many tokens."""
        return context_bytes(self.description, self._options, self._loaded, tokens)

    def _weights(self) -> LoadedDrafter:
        if self._loaded is None:
            raise ModelError(
                f"the {self.serves} drafter has no weights", "build the pipeline first"
            )
        return self._loaded


class BlockSession:
    """One generation: the weights, and a context that grows with what is committed."""

    def __init__(self, loaded: LoadedDrafter) -> None:
        self._loaded = loaded
        self._context = BlockContext(loaded)

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Take in the features [B, T, F] of committed tokens.

        Raises:
            ValueError: no features, or rows of different lengths.
        """
        self._context.observe(committed, features)

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """`width` tokens [B, width] after the anchor [B]."""
        return self.propose_first(anchor, width, width, sampling)

    def propose_first(
        self, anchor: mx.array, width: int, count: int, sampling: SamplingState
    ) -> Draft:
        """The first `count` of the `width` tokens that `propose` gives; the others cost no head."""
        draft = self._propose(anchor, width, count, sampling)
        return draft if count == width else attrs.evolve(draft, filled=width)

    def _propose(self, anchor: mx.array, width: int, count: int, sampling: SamplingState) -> Draft:
        """`count` tokens [B, count] from one pass over [anchor, MASK ..] with `width` slots."""
        raise NotImplementedError

    def memory(self) -> dict[str, int]:
        """Bytes of the context."""
        return self._context.memory()
