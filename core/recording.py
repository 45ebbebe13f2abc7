"""A recurrent layer's cache during verify: it records, and leaves the cache itself untouched.

The rollback hands the verify pass this stand-in; a layer that can record writes its updates to
it; committing reads them. The cache is written once, by the commit, so that there is nothing to
undo when a cycle is aborted.
"""

from __future__ import annotations

from typing import Any

import attrs
import mlx.core as mx

__all__ = ["RecordingEntry"]


class RecordingEntry:
    """Stands in for an mlx-lm `ArraysCache` while a block is verified.

    The layer sees working slots that begin as the cache's own and follow every token it runs, and
    calls `record` once a pass.

    Args:
        entry: the cache it stands in for; only read.

    Attributes:
        slots: the working slots, as the cache's `cache` list.
        tapes: what the layer recorded, one item a pass, in order.
        windows: inputs of the short convolutions of each pass, [B, W + T, C] each: the W values
            before the pass and the T of the pass.
    """

    def __init__(self, entry: Any) -> None:
        self._entry = entry
        self.slots: list[Any] = list(entry.cache)
        self.tapes: list[Any] = []
        self.windows: list[tuple[mx.array, ...]] = []

    def record(self, tape: Any, *windows: mx.array) -> None:
        """Keep what one pass did to the state.

        Args:
            tape: per-token updates, of a kind that the rollback of this layer can replay; None for
                a layer that has a convolution and no state.
            *windows: [B, W + T, C], one a convolution, in the order of their slots.
        """
        self.tapes.append(tape)
        self.windows.append(windows)

    @property
    def recorded_bytes(self) -> int:
        """Bytes of the tapes and windows recorded so far."""
        tapes = [attrs.asdict(t, recurse=False) for t in self.tapes if attrs.has(type(t))]
        arrays = [window for windows in self.windows for window in windows]
        arrays += [value for tape in tapes for value in tape.values()]
        return sum(a.nbytes for a in arrays if isinstance(a, mx.array))

    def __getitem__(self, index: int) -> Any:
        return self.slots[index]

    def __setitem__(self, index: int, value: Any) -> None:
        self.slots[index] = value

    @property
    def lengths(self) -> Any:
        """Per-row lengths of a padded batch, as the cache has them."""
        return self._entry.lengths

    @property
    def state(self) -> Any:
        """The working slots, for evaluation."""
        return self.slots

    def make_mask(self, tokens: int) -> mx.array | None:
        """The padding mask of the cache: [B, T] bool or None."""
        return self._entry.make_mask(tokens)

    def advance(self, tokens: int) -> None:
        """A layer has run `tokens` tokens.

        Raises:
            ValueError: the cache pads its rows; padded rows cannot be verified.
        """
        if self._entry.lengths is not None or self._entry.left_padding is not None:
            raise ValueError("a padded batch cannot be verified with a recorded tape")
