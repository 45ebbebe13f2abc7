"""Caches of a pass that is traced once and replayed: what goes in, what comes out.

A *port* stands at one cache of one pass. Its *form* says all that a trace depends on, shapes and
types, and holds no array: equal forms share a trace. While the pass is traced the model sees
stand-ins over placeholders; afterwards the arrays that the replay gave go into the real cache.

Ports are made for every layer in every cycle, so that little is done for each: a trace knows the
form of the next pass over what it leaves deferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import attrs
import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache

from draftloom.kernels.gated_delta import row_counts
from draftloom.kv_view import KVCacheView
from draftloom.recording import Deferred, DeferredSlots, RecordingEntry
from draftloom.row_writes import traced_rows, write_rows

__all__ = ["Forms", "Port", "TracedKVCache", "port_of"]

Shape = tuple[tuple[int, ...], mx.Dtype]
Forms = dict[Any, Any]
"""Forms that traces of one model know, by themselves: of equal ones one is used, which is found
again without comparing what is in it."""


class TracedKVCache(KVCacheView):
    """A key/value cache at its allocated length, at an offset that is an array.

    Args:
        keys, values: [B, Hkv, N, D], all allocated rows.
        offset: int32 without axes, the rows that are valid.
    """

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array) -> None:
        super().__init__(None)
        self.keys, self.values, self.offset = keys, values, offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [B, Hkv, T, D] at the offset and give all allocated rows."""
        self.keys = write_rows(self.keys, keys, self.offset)
        self.values = write_rows(self.values, values, self.offset)
        self.offset = self.offset + keys.shape[2]
        return self.keys, self.values

    def make_mask(
        self, tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Which rows each of T queries may see: itself and what is before it, [T, N] bool."""
        query = self.offset + mx.arange(tokens)[:, None]
        key = mx.arange(self.keys.shape[2])[None]
        mask = key <= query
        return mask if window_size is None else mask & (query < key + window_size)


@attrs.frozen(cache_hash=True)
class _KVForm:
    """A plain key/value cache: keys and values as allocated."""

    keys: Shape
    values: Shape

    def trace(self, arrays: Sequence[mx.array], offset: mx.array) -> TracedKVCache:
        return TracedKVCache(arrays[0], arrays[1], offset)

    def results(self, traced: TracedKVCache, known: Forms) -> tuple[list[mx.array], None]:
        return [traced.keys, traced.values], None


@lru_cache(maxsize=256)
def _kv_form(
    keys: tuple[int, ...], dtype: mx.Dtype, values: tuple[int, ...], other: mx.Dtype
) -> _KVForm:
    return _KVForm((keys, dtype), (values, other))


@attrs.frozen(cache_hash=True)
class _SlotsForm:
    """The slots of a recurrent cache that a layer replaces; None is a slot that is empty."""

    slots: tuple[Shape | None, ...]

    def trace(self, arrays: Sequence[mx.array], offset: mx.array) -> Any:
        return _slots_cache(_fill(self.slots, arrays))

    def results(self, traced: Any, known: Forms) -> tuple[list[mx.array], None]:
        return list(traced.cache), None


@attrs.frozen(cache_hash=True)
class _RecordForm:
    """A recurrent cache that records, with a state that is there or left to be replayed.

    Attributes:
        slots: working slots; the last is None where the state is deferred.
        defers: as the entry has it.
        left: state, then tape, of the deferred state; empty where none is.
        tape: the tape's class.
        replay: how a deferred state comes about; the same for all passes of a tuned model.
    """

    slots: tuple[Shape | None, ...]
    defers: bool
    left: tuple[Shape, ...] = ()
    tape: Any = None
    replay: Callable[..., mx.array] | None = attrs.field(default=None, eq=False)

    @classmethod
    def after(cls, windows: Sequence[mx.array | None], left: Deferred) -> _RecordForm:
        """Of a pass that goes on from a state left to be replayed.

        Args:
            windows: the slots before the state.
            left: how the state comes about.
        """
        made_of = tuple(_shape(array) for array in (left.state, *_parts(left.tape)))
        return cls((*_shapes(windows), None), True, made_of, type(left.tape), left.replay)

    def trace(self, arrays: Sequence[mx.array], offset: mx.array) -> RecordingEntry:
        slots = _fill(self.slots, arrays)
        if self.left:
            assert self.replay is not None
            state, *tape, count = arrays[-len(self.left) - 1 :]
            deferred = Deferred(state, self.tape(*tape), count, self.replay)
            slots = DeferredSlots(slots[:-1], deferred)
        return RecordingEntry(_slots_cache(slots), self.defers)

    def results(self, traced: RecordingEntry, known: Forms) -> tuple[list[mx.array], _Recorded]:
        tape, windows, after = traced.tapes[0], traced.windows[0], traced.deferred
        form = None if after is None else _RecordForm.after(traced.slots[:-1], after)
        slots = [slot for slot in traced.slots if slot is not None]
        parts = () if tape is None else _parts(tape)
        recorded = _Recorded(
            empty=tuple(i for i, slot in enumerate(traced.slots) if slot is None),
            slots=len(slots),
            windows=len(slots) + len(windows),
            parts=len(slots) + len(windows) + len(parts),
            tape=None if tape is None else type(tape),
            after=None if after is None else (after.count, after.replay),
            form=None if form is None else known.setdefault(form, form),
        )
        state = [] if after is None else [after.state]
        return [*slots, *windows, *parts, *state], recorded


@attrs.frozen(eq=False)
class _Recorded:
    """How the arrays that a recording layer gave are laid out: slots, inputs of convolutions, tape,
    state.

    Attributes:
        empty: slots with nothing in them.
        slots, windows, parts: where the arrays of each, and of the tape, end.
        tape: class of the tape; None is no tape.
        after: count and replay of the state after the pass, where that is deferred; None where a
            slot has it.
        form: of a pass that goes on from a deferred state.
    """

    empty: tuple[int, ...]
    slots: int
    windows: int
    parts: int
    tape: Any
    after: tuple[Any, Callable[..., mx.array]] | None
    form: _RecordForm | None


class Port:
    """One cache of one pass.

    Attributes:
        form: what a trace depends on.
        offset: where a key/value cache ends; None for others.
    """

    form: Any
    offset: int | None = None

    def take(self) -> list[mx.array]:
        """The arrays that go in. A key/value cache lets go of its own, so that the device can
        write where they lie."""
        raise NotImplementedError

    def put_back(self, arrays: Sequence[mx.array]) -> None:
        """Nothing was run: the arrays of `take` are the cache's again."""

    def store(self, arrays: list[mx.array], layout: Any, tokens: int) -> None:
        """Put the arrays that came out into the cache, which is T tokens further."""
        raise NotImplementedError


class _KVPort(Port):
    def __init__(self, cache: Any, tokens: int) -> None:
        self._cache, self.offset = cache, cache.offset
        _make_room(cache, tokens)
        keys, values = cache.keys, cache.values
        self.form = _kv_form(keys.shape, keys.dtype, values.shape, values.dtype)

    def take(self) -> list[mx.array]:
        arrays = [self._cache.keys, self._cache.values]
        self._cache.keys = self._cache.values = None
        return arrays

    def put_back(self, arrays: Sequence[mx.array]) -> None:
        self._cache.keys, self._cache.values = arrays

    def store(self, arrays: list[mx.array], layout: Any, tokens: int) -> None:
        self._cache.keys, self._cache.values = arrays
        self._cache.offset += tokens


class _SlotsPort(Port):
    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._slots = list(cache.cache)
        self.form = _SlotsForm(_shapes(self._slots))

    def take(self) -> list[mx.array]:
        return [slot for slot in self._slots if slot is not None]

    def store(self, arrays: list[mx.array], layout: Any, tokens: int) -> None:
        self._cache.cache = arrays


class _RecordPort(Port):
    def __init__(self, entry: RecordingEntry, rows: int) -> None:
        self._entry = entry
        slots, left = entry.slots, entry.deferred
        if left is None:
            self.form = _RecordForm(_shapes(slots), entry.defers)
            self._arrays = [slot for slot in slots if slot is not None]
            return
        windows = slots[:-1]
        self.form = left.form or _RecordForm.after(windows, left)
        count = row_counts(left.count, rows)
        self._arrays = [*windows, left.state, *_parts(left.tape), count]

    def take(self) -> list[mx.array]:
        return self._arrays

    def store(self, arrays: list[mx.array], layout: _Recorded, tokens: int) -> None:
        entry = self._entry
        slots: list[Any] = [*arrays[: layout.slots]]
        for index in layout.empty:
            slots.insert(index, None)
        entry.slots = slots
        windows = arrays[layout.slots : layout.windows]
        parts = arrays[layout.windows : layout.parts]
        tape = None if layout.tape is None else layout.tape(*parts)
        after = None
        if layout.after is not None:
            after = Deferred(arrays[layout.parts], tape, *layout.after, layout.form)
        entry.record(tape, *windows, after=after)


def port_of(entry: Any, tokens: int, rows: int) -> Port | str:
    """The port of what a pass was given as a cache, or why it has none.

    Args:
        entry: a plain `KVCache` or a view of one, an `ArraysCache`, a `RecordingEntry`.
        tokens: T of the pass; a key/value cache gets room for them.
        rows: B.
    """
    if isinstance(entry, RecordingEntry):
        return "its rows are padded" if entry.padded else _RecordPort(entry, rows)
    cache = entry.whole if isinstance(entry, KVCacheView) else entry
    if type(cache) is KVCache:
        return "a cache is empty" if cache.keys is None else _KVPort(cache, tokens)
    if type(cache) is ArraysCache:
        padded = cache.lengths is not None or cache.left_padding is not None
        return "its rows are padded" if padded else _SlotsPort(cache)
    return f"it has a {type(cache).__name__}"


def _make_room(cache: Any, tokens: int) -> None:
    """Allocate rows for T more tokens. Each length is traced anew: see `traced_rows`."""
    held = cache.keys.shape[2]
    length = traced_rows(held, cache.offset + tokens, cache.step)
    if length == held:
        return
    for name in ("keys", "values"):
        old = getattr(cache, name)
        more = mx.zeros((*old.shape[:2], length - held, old.shape[3]), old.dtype)
        setattr(cache, name, mx.concatenate([old, more], axis=2))


def _shape(array: mx.array) -> Shape:
    return tuple(array.shape), array.dtype


def _shapes(slots: Sequence[mx.array | None]) -> tuple[Shape | None, ...]:
    return tuple(None if slot is None else _shape(slot) for slot in slots)


def _fill(shapes: Sequence[Shape | None], arrays: Sequence[mx.array]) -> list[Any]:
    given = iter(arrays)
    return [None if shape is None else next(given) for shape in shapes]


def _slots_cache(slots: list[Any]) -> Any:
    cache: Any = ArraysCache(len(slots))
    cache.cache = slots
    return cache


def _parts(tape: Any) -> tuple[mx.array, ...]:
    """The arrays of a tape, in the order of its constructor."""
    kind: Any = type(tape)
    found: tuple[mx.array, ...] = _fields_of(kind)(tape)
    return found


@lru_cache(maxsize=8)
def _fields_of(tape: Any) -> attrgetter[Any]:
    return attrgetter(*(field.name for field in attrs.fields(tape)))
