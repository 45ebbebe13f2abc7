"""A rollback: verify on a copy of the cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from draftloom import CacheKind, ComponentInfo


class CopyRollback:
    """Serves any cache: the copy becomes the cache if everything in it was accepted."""

    info = ComponentInfo(
        "lab.copy",
        "verify on a copy, run the accepted tokens again",
        cache_kinds=tuple(CacheKind),
    )

    def begin(self, entry: Any, block: mx.array) -> Copied:
        """Prepare one cache entry for the verification of block [B, K+1]."""
        return Copied(entry)


class Copied:
    """One cache entry while a block is verified."""

    reforwards = True

    def __init__(self, entry: Any) -> None:
        self.kept = entry
        self.before = dict(vars(entry))
        self.entry = copy.deepcopy(entry)

    def commit(self, num_accepted: Sequence[int]) -> None:
        """Called when all was accepted; otherwise the accepted tokens run again after `abort`."""
        vars(self.kept).update(vars(self.entry))

    def abort(self) -> None:
        """The cache as it was before the block."""
        vars(self.kept).update(self.before)
