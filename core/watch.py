"""The memory of one generation: the prompt under guard, a look while the text grows, the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from draftloom.contracts import CacheKind, Speculation
from draftloom.drafting import GuardedDrafter
from draftloom.errors import GenerationError, UsageError
from draftloom.guard import MemoryGuard
from draftloom.kv_conversion import KVConversion
from draftloom.memory import MemoryUse, UsesMemory, cache_bytes, module_bytes
from draftloom.prefill import Prefill
from draftloom.recording import RecordingEntry

if TYPE_CHECKING:
    from draftloom.parts import EngineParts

__all__ = ["MemoryWatch"]

BLOCK = 64
"""Tokens of a block at most, for what a cycle needs to work."""
STATES = (CacheKind.GATED_DELTA, CacheKind.RECURRENT)


class MemoryWatch:
    """Guards a generation and counts what it holds.

    Args:
        parts: of the pipeline.
        cache: the target's caches.
        conversion: packs them.
        drafter: given up where memory is short.

    Attributes:
        guard: of this generation.
        prefill: runs the prompt; made by `prepare`.
    """

    prefill: Prefill
    guard: MemoryGuard

    def __init__(
        self,
        parts: EngineParts,
        cache: list[Any],
        conversion: KVConversion,
        drafter: GuardedDrafter,
    ) -> None:
        self._parts = parts
        self._cache = cache
        self._conversion = conversion
        self._drafter = drafter
        self._tape = 0
        self._widest = 1

    def prepare(
        self,
        step: int | None,
        cancelled: Callable[[], bool],
        report: Callable[[int, int], None] | None,
    ) -> None:
        """Make guard and prefill.

        Args:
            step: prompt tokens to run at once; None is what the pipeline says.
            cancelled: polled before every chunk.
            report: told (tokens done, tokens of the prompt).

        Raises:
            UsageError: a step below 1.
        """
        parts = self._parts
        step = parts.memory.prefill_step_size if step is None else step
        if step < 1:
            raise UsageError(f"prefill_chunk must be at least 1, got {step}")
        limit = parts.memory.limit
        self.guard = MemoryGuard(limit, None if limit is None else parts.costs(), step)
        self.prefill = Prefill(
            target=parts.target,
            cache=self._cache,
            conversion=self._conversion,
            drafter=self._drafter,
            guard=self.guard,
            cancelled=cancelled,
            report=report or (lambda done, total: None),
        )

    def begin(self, prompt_end: int, wanted: int) -> bool:
        """Before a generation: whether its drafter is to be opened.

        Args:
            prompt_end: tokens in the caches after the prompt.
            wanted: tokens to generate.

        Raises:
            MemoryLimitError: it does not fit; has the numbers.
        """
        held = sum(map(cache_bytes, self._cache))
        if self.guard.begin(held, prompt_end, prompt_end + wanted, drafter=True):
            return True
        self._drafter.drop(self.guard.shrunk[-1])
        return False

    def weigh(self, speculation: Speculation | None) -> None:
        """Note what a block records that is wider than those before it."""
        if speculation is None or speculation.block.shape[1] <= self._widest:
            return
        self._widest = speculation.block.shape[1]
        entries = [e for e in speculation.cache if isinstance(e, RecordingEntry)]
        self._tape = max(self._tape, sum(entry.recorded_bytes for entry in entries))

    def look(self, position: int, ahead: int) -> GenerationError | None:
        """While a text grows: do the next tokens fit, without the drafter if not with it?

        Args:
            position: tokens in the caches.
            ahead: tokens until the next look.
        """
        guard = self.guard
        if ahead <= 0 or guard.fits(position, ahead, BLOCK):
            return None
        if self._drafter.alive:
            self._drafter.drop(guard.drop_drafter(position, ahead, BLOCK))
            if guard.fits(position, ahead, BLOCK):
                return None
        return GenerationError(
            f"the text does not fit: {guard.refuse(position, ahead, BLOCK)}",
            "raise --memory-limit, or generate fewer tokens",
        )

    def report(self) -> MemoryUse:
        """What this generation holds now, and the most it held for a moment."""
        parts = self._parts
        drafter = parts.drafter.memory() if isinstance(parts.drafter, UsesMemory) else {}
        held = {True: 0, False: 0}
        for entry, kind in zip(self._cache, parts.target.info.cache_kinds, strict=False):
            held[kind in STATES] += cache_bytes(entry)
        return MemoryUse(
            target_weights=module_bytes(parts.target.model),
            drafter_weights=sum(drafter.values()),
            kv_caches=held[False],
            recurrent_states=held[True],
            drafter_context=self._drafter.memory(),
            features=self.prefill.features,
            tape=self._tape,
            peak=mx.get_peak_memory(),
            limit=self.guard.limit,
            prefill_step_size=self.prefill.smallest,
            shrunk=tuple(self.guard.shrunk),
        )
