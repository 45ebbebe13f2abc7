"""One rollback over all caches of a model, composed of one strategy for each cache kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from draftloom.contracts import CacheKind, CacheRollback, LayerSpeculation, TargetAdapter

__all__ = ["CompositeRollback", "CompositeSpeculation"]


class CompositeRollback:
    """Opens a speculation over every cache of a target.

    Args:
        rollbacks: the strategy of each cache kind that the target has.
        target: whose caches they are; runs accepted tokens again for strategies that need it.
    """

    def __init__(self, rollbacks: Mapping[CacheKind, CacheRollback], target: TargetAdapter) -> None:
        self._by_entry = [rollbacks[kind] for kind in target.info.cache_kinds]
        self._target = target

    def begin(self, cache: list[Any], block: mx.array) -> CompositeSpeculation:
        """Prepare all caches for the verification of block [B, K+1] int32.

        An exception leaves the caches as they were.
        """
        begun: list[LayerSpeculation] = []
        try:
            for rollback, entry in zip(self._by_entry, cache, strict=True):
                begun.append(rollback.begin(entry, block))
        except BaseException:
            for speculation in begun:
                speculation.abort()
            raise
        return CompositeSpeculation(begun, cache, block, self._target)


class CompositeSpeculation:
    """All caches while a block is being verified. See `draftloom.contracts.Speculation`."""

    def __init__(
        self,
        layers: Sequence[LayerSpeculation],
        cache: list[Any],
        block: mx.array,
        target: TargetAdapter,
    ) -> None:
        self._layers = layers
        self._base = cache
        self.block = block
        self._target = target
        self._reforwards = any(layer.reforwards for layer in layers)
        self.cache: list[Any] = [layer.entry for layer in layers]

    def commit(self, num_accepted: Sequence[int]) -> None:
        """Keep the anchor and the accepted draft tokens of each row."""
        width = self.block.shape[1] - 1
        if not self._reforwards or all(n == width for n in num_accepted):
            started: list[mx.array] = []
            for layer in self._layers:
                layer.commit(num_accepted)
                started += getattr(layer, "started", ())
            if started:
                mx.async_eval(started)
            return
        if len(set(num_accepted)) > 1:
            raise ValueError("rows that accept different counts cannot be run again together")
        self.abort()
        self._target.forward(self.block[:, : num_accepted[0] + 1], self._base)
        mx.async_eval([entry.state for entry in self._base])

    def abort(self) -> None:
        """Put every cache back as before `begin`."""
        for layer in self._layers:
            layer.abort()
