"""Tape replay: a recurrent state goes on from before the block, by the tokens that were kept.

Memory: the tape is a few vectors a token and layer. The state before the block is the cache
itself, which verify leaves alone; no second state is held.

Deferred replay: a commit may leave the replay undone. The cache's slots then say what the state is
made of (`DeferredSlots`): the state before, the tape, and how many entries. Anybody who looks at
the state finds it as a lazy array. The next block hands what it is made of to the layer instead,
which replays and verifies in one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache

from draftloom.contracts import CacheKind, ComponentInfo, LayerSpeculation, Need
from draftloom.errors import UsageError
from draftloom.kernel_settings import AUTO, OFF, KernelSettings
from draftloom.kernels import gated_delta, ssm
from draftloom.recording import Deferred, DeferredSlots, RecordingEntry

from .trim import TrimRollback

__all__ = ["TapeReplayRollback"]


class TapeReplayRollback:
    """Replays the accepted entries of the tape that recurrent layers record during verify.

    Args:
        defer: leave the replay to the next block of the layer, for layers that can do both in one
            launch; by default where that was found to pay.
    """

    info = ComponentInfo(
        "tape-replay",
        "recurrent layers: rebuild the state from the recorded updates",
        needs=(Need.TAPE,),
        cache_kinds=(CacheKind.GATED_DELTA, CacheKind.RECURRENT, CacheKind.OTHER),
    )

    def __init__(self, defer: bool | None = None) -> None:
        self._given = defer
        self.tune(KernelSettings())

    def tune(self, settings: KernelSettings) -> None:
        """Choose the kernel that replays (``gated-delta``), whether the next block does that
        (``replay-verify``), and how key/value caches beside the state are seen
        (``fixed-length-caches``)."""
        self._trim = TrimRollback()
        self._trim.tune(settings)
        use = gated_delta.prefer(settings.use("gated-delta"))
        self._delta_replay = partial(gated_delta.replay, use=use)
        choice = settings.choice("replay-verify")
        if choice != AUTO:
            self._defers = choice != OFF
        elif self._given is not None:
            self._defers = self._given
        else:
            self._defers = gated_delta.deferral.by_default()

    def begin(self, entry: Any, block: mx.array) -> LayerSpeculation:
        """Let the layer record block [B, K+1] instead of writing its cache. A block without draft
        tokens needs no tape: the layer runs as in plain decoding.

        Raises:
            UsageError: a cache that is neither recurrent nor made of such and key/value caches.
        """
        if isinstance(entry, ArraysCache):
            tokens = block.shape[1]
            if tokens == 1:
                return _OneToken(entry)
            return _Recorded(entry, tokens, self._delta_replay, self._defers)
        if isinstance(entry, CacheList):
            return _Several([self._child(child, block) for child in entry.caches])
        raise UsageError(f"tape-replay cannot take back a {type(entry).__name__}", "use snapshot")

    def _child(self, entry: Any, block: mx.array) -> LayerSpeculation:
        if type(entry) is KVCache:
            return self._trim.begin(entry, block)
        return self.begin(entry, block)


class _Several:
    """A layer with several caches, as one that attends and has a state besides."""

    reforwards = False

    def __init__(self, children: Sequence[LayerSpeculation]) -> None:
        self._children = children
        self.entry = _Entries([child.entry for child in children])
        self.started: list[mx.array] = []

    def commit(self, num_accepted: Sequence[int]) -> None:
        self.started = []
        for child in self._children:
            child.commit(num_accepted)
            self.started += getattr(child, "started", ())

    def abort(self) -> None:
        for child in self._children:
            child.abort()


class _Entries:
    """Stands in for a `CacheList` during verify."""

    def __init__(self, entries: Sequence[Any]) -> None:
        self.caches = tuple(entries)

    def __getitem__(self, index: int) -> Any:
        return self.caches[index]

    @property
    def state(self) -> Any:
        """For evaluation."""
        return [entry.state for entry in self.caches]


class _OneToken:
    """The anchor alone: it is kept, or all of it is taken back. Layers replace the arrays of their
    cache whole, so that the ones from before are kept by reference."""

    reforwards = False

    def __init__(self, entry: Any) -> None:
        self.entry = entry
        self._before = {**vars(entry), "cache": list(entry.cache)}

    def commit(self, num_accepted: Sequence[int]) -> None:
        """There is nothing to take back."""

    def abort(self) -> None:
        vars(self.entry).update({**self._before, "cache": list(self._before["cache"])})


class _Recorded:
    """Slots: the windows of the convolutions [B, W, C], then the state, if the layer has one.

    Args:
        entry: the cache.
        tokens: of the block.
        delta_replay: (state, tape, count) -> the state after them.
        defers: whether commits leave the replay to whoever wants the state.
    """

    reforwards = False

    def __init__(
        self,
        entry: Any,
        tokens: int,
        delta_replay: Callable[..., mx.array],
        defers: bool,
    ) -> None:
        self._cache = entry
        self._tokens = tokens
        self._delta_replay = delta_replay
        self.entry = RecordingEntry(entry, defers)
        slots = entry.cache
        self._before: list[Any] = list(slots) if self.entry.deferred is None else slots
        self.started: list[mx.array] = []

    def commit(self, num_accepted: Sequence[int]) -> None:
        before, self.started = self.entry.before, []
        if before is not None:  # the pass that gave the logits gave this state too
            self._cache.cache = self._defer(before, num_accepted)
            return
        if all(n + 1 == self._tokens for n in num_accepted):
            kept = self.started = list(self.entry.state)
        else:
            kept = _windows(self.entry, num_accepted)
            if len(self._before) > len(kept):
                self.started = [self._replay(self._state(), num_accepted)]
                kept += self.started
        self._cache.cache = kept

    def abort(self) -> None:
        deferred = isinstance(self._before, DeferredSlots)
        self._cache.cache = self._before if deferred else list(self._before)

    def _state(self) -> mx.array:
        """The state before the block."""
        state: mx.array | None = self._before[-1]
        return mx.zeros_like(self.entry.slots[-1]) if state is None else state

    def _replay(self, state: mx.array, num_accepted: Sequence[int]) -> mx.array:
        tapes, count = self.entry.tapes, _count(num_accepted)
        if isinstance(tapes[0], ssm.SsmTape):
            return ssm.replay(state, ssm.concat_tapes(tapes), count)
        return self._delta_replay(state, gated_delta.concat_tapes(tapes), count)

    def _defer(self, before: mx.array, num_accepted: Sequence[int]) -> DeferredSlots:
        """The slots after the kept tokens; nothing is replayed.

        `abort` still knows what the state before this block was made from. It is freed with this
        object, before the next block is verified and while the device drafts: so there are never
        more than two states of a layer, `before` and its neighbour, and no commit waits for it.
        """
        entry, last = self.entry, self.entry.deferred
        form = None if last is None or len(entry.tapes) > 1 else last.form
        tape = gated_delta.concat_tapes(entry.tapes)
        deferred = Deferred(before, tape, _count(num_accepted), self._delta_replay, form)
        return DeferredSlots(entry.windows[0], deferred, partial(_windows, entry, num_accepted))


def _windows(entry: RecordingEntry, num_accepted: Sequence[int]) -> list[mx.array]:
    """The last W inputs of each convolution after the kept tokens: views, where that is enough.
    They hold the W + T inputs of the block until the next one is verified."""
    start = _agreed(num_accepted)
    if start is not None:
        return [x[:, start : start + size] for x, size in _inputs(entry)]
    starts = mx.array(list(num_accepted))[:, None, None] + 1
    return [
        mx.take_along_axis(x, starts + mx.arange(size)[:, None], axis=1)
        for x, size in _inputs(entry)
    ]


def _inputs(entry: RecordingEntry) -> list[tuple[mx.array, int]]:
    """Inputs [B, W + T, C] of each convolution, and its W."""
    whole = entry.windows[0] if len(entry.windows) == 1 else _joined(entry)
    return [(x, slot.shape[1]) for x, slot in zip(whole, entry.slots[: len(whole)], strict=True)]


def _joined(entry: RecordingEntry) -> list[mx.array]:
    """Inputs [B, W + T, C] of each convolution, over passes that ran one after the other."""
    first, *rest = entry.windows
    sizes = [slot.shape[1] for slot in entry.slots[: len(first)]]
    parts = [[x, *(later[i][:, sizes[i] :] for later in rest)] for i, x in enumerate(first)]
    return [mx.concatenate(part, axis=1) for part in parts]


def _agreed(num_accepted: Sequence[int]) -> int | None:
    """Tokens to keep, where all rows keep as many."""
    first = num_accepted[0] + 1
    return first if len(num_accepted) == 1 or len(set(num_accepted)) == 1 else None


def _count(num_accepted: Sequence[int]) -> int | mx.array:
    """Tape entries to keep: one number where the rows agree, else an array that layers share."""
    agreed = _agreed(num_accepted)
    if agreed is not None:
        return agreed
    return gated_delta.row_counts(tuple(n + 1 for n in num_accepted), len(num_accepted))
