"""Tape replay: a recurrent state goes on from before the block, by the tokens that were kept.

Memory: the tape is a few vectors a token and layer. The state before the block is the cache
itself, which verify leaves alone; no second state is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from draftloom.contracts import CacheKind, ComponentInfo, Need
from draftloom.kernels.gated_delta import concat_tapes, replay
from draftloom.recording import RecordingEntry

__all__ = ["TapeReplayRollback"]


class TapeReplayRollback:
    """Replays the accepted entries of the tape that gated-delta layers record during verify."""

    info = ComponentInfo(
        "tape-replay",
        "gated delta: rebuild the state from the recorded updates",
        needs=(Need.TAPE,),
        cache_kinds=(CacheKind.GATED_DELTA,),
    )

    def begin(self, entry: Any, block: mx.array) -> _Recorded | _OneToken:
        """Let the layer record block [B, K+1] instead of writing its cache. A block without draft
        tokens needs no tape: the layer runs as in plain decoding."""
        tokens = block.shape[1]
        return _OneToken(entry) if tokens == 1 else _Recorded(entry, tokens)


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
    """Slots: 0 is the convolution window [B, W, C], 1 the state [B, Hv, Dv, Dk] float32."""

    reforwards = False

    def __init__(self, entry: Any, tokens: int) -> None:
        self._cache = entry
        self._before = list(entry.cache)
        self._tokens = tokens
        self.entry = RecordingEntry(entry)

    def commit(self, num_accepted: Sequence[int]) -> None:
        if all(n + 1 == self._tokens for n in num_accepted):
            self._cache.cache = list(self.entry.slots)
        else:
            self._cache.cache = [self._window(num_accepted), self._state(num_accepted)]
        mx.async_eval(self._cache.cache)

    def abort(self) -> None:
        self._cache.cache = list(self._before)

    def _window(self, num_accepted: Sequence[int]) -> mx.array:
        """The last W inputs of the convolution after the kept tokens."""
        first, *rest = self.entry.windows
        size = self.entry.slots[0].shape[1]
        window = mx.concatenate([first, *(w[:, size:] for w in rest)], axis=1) if rest else first
        if len(set(num_accepted)) == 1:
            start = num_accepted[0] + 1
            return mx.contiguous(window[:, start : start + size])
        starts = mx.array(list(num_accepted))[:, None] + 1 + mx.arange(size)
        return mx.take_along_axis(window, starts[..., None], axis=1)

    def _state(self, num_accepted: Sequence[int]) -> mx.array:
        tape = concat_tapes(self.entry.tapes)
        state = self._before[1]
        if state is None:
            rows, _, heads, size = tape.delta.shape
            state = mx.zeros((rows, heads, size, tape.k.shape[-1]), dtype=mx.float32)
        same = len(set(num_accepted)) == 1
        return replay(
            state, tape, num_accepted[0] + 1 if same else mx.array(list(num_accepted)) + 1
        )
