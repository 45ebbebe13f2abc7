"""A recurrent layer's cache during verify: it records, and leaves the cache itself untouched.

The rollback hands the verify pass this stand-in; a layer that can record writes its updates to
it; committing reads them. The cache is written once, by the commit, so that there is nothing to
undo when a cycle is aborted.

A state that a commit reaches need not be computed there and then. `Deferred` says how it comes
about, so that the next pass can do that work together with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import mlx.core as mx

__all__ = ["Deferred", "DeferredSlots", "RecordingEntry", "made_of"]


@attrs.frozen(eq=False)
class Deferred:
    """A recurrent state that is still to be replayed from a tape.

    Attributes:
        state: what the tape was recorded on.
        tape: per-token updates.
        count: entries to replay: one number, or int32 with one for each row.
        replay: (state, tape, count) -> the state after them, lazily.
        form: of the next pass, where a traced one left this: see `draftloom.adapters`. It is the
            same for every count, so that nobody has to look at the arrays again.
    """

    state: mx.array
    tape: Any
    count: int | mx.array
    replay: Callable[[mx.array, Any, Any], mx.array]
    form: Any = None

    def result(self) -> mx.array:
        """The state as a lazy array."""
        return self.replay(self.state, self.tape, self.count)


WINDOWS = slice(-1)
"""The slots before the state, which is the last."""


class DeferredSlots(list[Any]):
    """The slots of a recurrent cache, the last of which, the state, is still to be replayed.

    It is a list to whoever looks, `mx.eval` included: the state is then a lazy array, made at the
    first look. A copy is a plain list. Writing to the state ends the deferral.

    Args:
        slots: the slots before the state; all of them where nothing is deferred.
        deferred: how the state comes about.
        late: gives the slots before the state at the first look at them; `slots` then says how
            many there are.

    Attributes:
        deferred: as above; None once the state was written.
    """

    def __init__(
        self,
        slots: Iterable[Any] = (),
        deferred: Deferred | None = None,
        late: Callable[[], list[Any]] | None = None,
    ) -> None:
        super().__init__(slots)
        self.deferred = deferred
        self._late = late
        if deferred is not None:
            super().append(None)

    @property
    def windows(self) -> list[Any]:
        """The slots before the state."""
        self._arrive()
        return super().__getitem__(WINDOWS)

    def _arrive(self) -> None:
        if self._late is not None:
            super().__setitem__(WINDOWS, self._late())
            self._late = None

    def _look(self) -> None:
        if self.deferred is not None and super().__getitem__(-1) is None:
            super().__setitem__(-1, self.deferred.result())

    def __getitem__(self, index: Any) -> Any:
        self._arrive()
        if not isinstance(index, int) or index in (-1, len(self) - 1):
            self._look()
        return super().__getitem__(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._arrive()
        if not isinstance(index, int) or index in (-1, len(self) - 1):
            self._look()
            self.deferred = None
        super().__setitem__(index, value)

    def __iter__(self) -> Iterator[Any]:
        self._arrive()
        self._look()
        return super().__iter__()

    def copy(self) -> list[Any]:
        """A plain list of the slots."""
        return [*self]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, ([*self],)


class RecordingEntry:
    """Stands in for an mlx-lm `ArraysCache` while a block is verified.

    The layer sees working slots that begin as the cache's own and follow every token it runs, and
    calls `record` once a pass.

    Args:
        entry: the cache it stands in for; only read.
        defers: whether states are left to whoever wants them.

    Attributes:
        slots: the working slots, as the cache's `cache` list.
        tapes: what the layer recorded, one item a pass, in order.
        windows: inputs of the short convolutions of each pass, [B, W + T, C] each: the W values
            before the pass and the T of the pass.
        defers: a layer that can then tells `record` how the state after its pass comes about
            instead of computing it.
        deferred: how the state of the last slot comes about; None where that is an array like any
            other. A layer may go on from it instead of reading the slot.
        before: the state before the first pass, where that one left the state after it deferred.
    """

    def __init__(self, entry: Any, defers: bool = False) -> None:
        self._entry = entry
        slots = entry.cache
        self.deferred: Deferred | None = None
        if defers and isinstance(slots, DeferredSlots):
            self.deferred = slots.deferred
        self.slots: list[Any] = list(slots) if self.deferred is None else [*slots.windows, None]
        self.tapes: list[Any] = []
        self.windows: list[tuple[mx.array, ...]] = []
        self.defers = defers
        self.before: mx.array | None = None

    def record(self, tape: Any, *windows: mx.array, after: Deferred | None = None) -> None:
        """Keep what one pass did to the state.

        Args:
            tape: per-token updates, of a kind that the rollback of this layer can replay; None for
                a layer that has a convolution and no state.
            *windows: [B, W + T, C], one a convolution, in the order of their slots.
            after: how the state after the pass comes about, from a layer that has not computed it:
                this tape, all of it, on the state before the pass.
        """
        self.tapes.append(tape)
        self.windows.append(windows)
        self.deferred = after
        if after is not None:
            self.slots[-1] = None  # lets go of what the state before was made from
            if len(self.tapes) == 1:
                self.before = after.state

    @property
    def recorded_bytes(self) -> int:
        """Bytes of the tapes and windows recorded so far."""
        tapes = [attrs.asdict(t, recurse=False) for t in self.tapes if attrs.has(type(t))]
        arrays = [window for windows in self.windows for window in windows]
        arrays += [value for tape in tapes for value in tape.values()]
        return sum(a.nbytes for a in arrays if isinstance(a, mx.array))

    def __getitem__(self, index: int) -> Any:
        return self.state[index] if self._is_state(index) else self.slots[index]

    def __setitem__(self, index: int, value: Any) -> None:
        if self._is_state(index):
            self.deferred = None
        self.slots[index] = value

    def _is_state(self, index: int) -> bool:
        return index in (-1, len(self.slots) - 1)

    @property
    def padded(self) -> bool:
        """Whether the cache pads its rows."""
        return self._entry.lengths is not None or self._entry.left_padding is not None

    @property
    def lengths(self) -> Any:
        """Per-row lengths of a padded batch, as the cache has them."""
        return self._entry.lengths

    @property
    def state(self) -> Any:
        """The working slots, with a deferred state as its (lazy) array."""
        if self.deferred is not None and self.slots[-1] is None:
            self.slots[-1] = self.deferred.result()
        return self.slots

    def make_mask(self, tokens: int) -> mx.array | None:
        """The padding mask of the cache: [B, T] bool or None."""
        return self._entry.make_mask(tokens)

    def advance(self, tokens: int) -> None:
        """A layer has run `tokens` tokens.

        Raises:
            ValueError: the cache pads its rows; padded rows cannot be verified.
        """
        if self.padded:
            raise ValueError("a padded batch cannot be verified with a recorded tape")


def made_of(entry: Any) -> list[Any]:
    """What a cache holds, as far as a cycle computes it: of a state that is left to be replayed,
    what it is made of. Looking at such a state would replay it, which is the next pass's work."""
    slots: Any = getattr(entry, "cache", None)
    if isinstance(entry, RecordingEntry):
        deferred, slots = entry.deferred, entry.slots
    else:
        deferred = slots.deferred if isinstance(slots, DeferredSlots) else None
    if deferred is None:
        state = entry.state
        return list(state) if isinstance(state, list | tuple) else [state]
    windows = slots.windows if isinstance(slots, DeferredSlots) else slots[:-1]
    tape = attrs.asdict(deferred.tape, recurse=False).values()
    return [*windows, deferred.state, *tape]
