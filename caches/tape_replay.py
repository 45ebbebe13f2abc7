"""Tape replay: a recurrent state goes on from before the block, by the tokens that were kept.

Memory: the tape is a few vectors a token and layer. The state before the block is the cache
itself, which verify leaves alone; no second state is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache

from draftloom.contracts import CacheKind, ComponentInfo, LayerSpeculation, Need
from draftloom.errors import UsageError
from draftloom.kernel_settings import KernelSettings
from draftloom.kernels import gated_delta, ssm
from draftloom.recording import RecordingEntry

from .trim import TrimRollback

__all__ = ["TapeReplayRollback"]


class TapeReplayRollback:
    """Replays the accepted entries of the tape that recurrent layers record during verify."""

    info = ComponentInfo(
        "tape-replay",
        "recurrent layers: rebuild the state from the recorded updates",
        needs=(Need.TAPE,),
        cache_kinds=(CacheKind.GATED_DELTA, CacheKind.RECURRENT, CacheKind.OTHER),
    )

    def __init__(self) -> None:
        self.tune(KernelSettings())

    def tune(self, settings: KernelSettings) -> None:
        """Choose the kernel that replays (``gated-delta``), and how key/value caches beside the
        state are seen (``fixed-length-caches``)."""
        self._trim = TrimRollback()
        self._trim.tune(settings)
        self._use = gated_delta.prefer(settings.use("gated-delta"))

    def begin(self, entry: Any, block: mx.array) -> LayerSpeculation:
        """Let the layer record block [B, K+1] instead of writing its cache. A block without draft
        tokens needs no tape: the layer runs as in plain decoding.

        Raises:
            UsageError: a cache that is neither recurrent nor made of such and key/value caches.
        """
        tokens = block.shape[1]
        if isinstance(entry, CacheList):
            return _Several([self._child(child, block) for child in entry.caches])
        if not isinstance(entry, ArraysCache):
            raise UsageError(
                f"tape-replay cannot take back a {type(entry).__name__}", "use snapshot"
            )
        return _OneToken(entry) if tokens == 1 else _Recorded(entry, tokens, self._use)

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

    def commit(self, num_accepted: Sequence[int]) -> None:
        for child in self._children:
            child.commit(num_accepted)

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
    """Slots: the windows of the convolutions [B, W, C], then the state, if the layer has one."""

    reforwards = False

    def __init__(self, entry: Any, tokens: int, use: gated_delta.Preference | None) -> None:
        self._cache = entry
        self._before = list(entry.cache)
        self._tokens = tokens
        self._use = use
        self.entry = RecordingEntry(entry)

    def commit(self, num_accepted: Sequence[int]) -> None:
        if all(n + 1 == self._tokens for n in num_accepted):
            self._cache.cache = list(self.entry.slots)
        else:
            count = len(self.entry.windows[0])
            kept: list[Any] = [self._window(slot, num_accepted) for slot in range(count)]
            if len(self._before) > count:
                kept.append(self._state(num_accepted))
            self._cache.cache = kept
        mx.async_eval(self._cache.cache)

    def abort(self) -> None:
        self._cache.cache = list(self._before)

    def _window(self, slot: int, num_accepted: Sequence[int]) -> mx.array:
        """The last W inputs of a convolution after the kept tokens."""
        first, *rest = (windows[slot] for windows in self.entry.windows)
        size = self.entry.slots[slot].shape[1]
        window = mx.concatenate([first, *(w[:, size:] for w in rest)], axis=1) if rest else first
        if len(set(num_accepted)) == 1:
            start = num_accepted[0] + 1
            return mx.contiguous(window[:, start : start + size])
        starts = mx.array(list(num_accepted))[:, None] + 1 + mx.arange(size)
        return mx.take_along_axis(window, starts[..., None], axis=1)

    def _state(self, num_accepted: Sequence[int]) -> mx.array:
        state, tapes = self._before[-1], self.entry.tapes
        if state is None:
            state = mx.zeros_like(self.entry.slots[-1])
        same = len(set(num_accepted)) == 1
        count = num_accepted[0] + 1 if same else mx.array(list(num_accepted)) + 1
        if isinstance(tapes[0], ssm.SsmTape):
            return ssm.replay(state, ssm.concat_tapes(tapes), count)
        return gated_delta.replay(state, gated_delta.concat_tapes(tapes), count, use=self._use)
