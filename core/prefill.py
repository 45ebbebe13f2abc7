"""The prompt: run in chunks, its features handed on chunk by chunk.

Never more than one chunk's features are alive: a drafter that keeps a context turns them into rows
of its own at once, and nothing here refers to them while the next chunk runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import mlx.core as mx

from draftloom.contracts import TargetAdapter
from draftloom.drafting import GuardedDrafter, one_line
from draftloom.errors import GenerationError
from draftloom.guard import MemoryGuard
from draftloom.kv_conversion import KVConversion

__all__ = ["Prefill"]


@attrs.define(eq=False)
class Prefill:
    """Runs all of a prompt but its last token.

    Attributes:
        target: whose caches are filled.
        cache: the caches.
        conversion: packs them when their time has come.
        drafter: is shown the tokens and their features.
        guard: says how many tokens fit at once.
        cancelled: polled before every chunk.
        report: told (tokens done, tokens of the prompt).
        features: most bytes of features that were taken at once.
        smallest: fewest tokens that were run at once, the last chunk apart; 0 before the first.
    """

    target: TargetAdapter
    cache: list[Any]
    conversion: KVConversion
    drafter: GuardedDrafter
    guard: MemoryGuard
    cancelled: Callable[[], bool]
    report: Callable[[int, int], None]
    features: int = 0
    smallest: int = 0

    def run(self, prompt: tuple[int, ...], past: int) -> bool:
        """Run it; False where it was cancelled.

        Args:
            prompt: token ids.
            past: tokens that the caches hold already.

        Raises:
            GenerationError: the target failed, or memory is short.
        """
        total, start = len(prompt), 0
        self.report(0, total)
        while start < total - 1:
            if self.cancelled():
                return False
            size = self._size(past + start, total - 1 - start)
            self._chunk(prompt[start : start + size])
            start += size
            if start < total - 1 or not self.smallest:
                self.smallest = min(size, self.smallest or size)
            self.report(start, total)
            mx.clear_cache()
        return True

    def _size(self, position: int, remaining: int) -> int:
        size = self.guard.chunk(position, remaining)
        if not size and self.drafter.alive:
            self.drafter.drop(self.guard.drop_drafter(position, 1, 1))
            size = self.guard.chunk(position, remaining)
        if not size:
            raise GenerationError(
                f"the prompt does not fit: {self.guard.refuse(position, 1, 1)}",
                "raise --memory-limit, or shorten the prompt",
            )
        return size

    def _chunk(self, chunk: tuple[int, ...]) -> None:
        try:
            self.conversion.before_pass()
            features = self.target.forward(mx.array([chunk]), self.cache).features
            self.conversion.settle()
            # Features that are not computed here would keep what they are computed from: caches.
            wanted = features if self.drafter.alive else None
            mx.eval([entry.state for entry in self.cache], wanted)
        except Exception as error:
            raise GenerationError(f"the target failed on the prompt: {one_line(error)}") from error
        if features is not None:
            self.features = max(self.features, features.nbytes)
        self.drafter.observe(chunk, features)
