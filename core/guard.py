"""The memory guard: shrinks what can be shrunk, refuses the rest, before the system swaps.

It looks three times: before weights are loaded, when a generation begins, and before every chunk of
a prompt (and now and then while a text grows). What is smaller for it changes speed, never tokens,
with one exception that is mlx-lm's own: over quantized caches the first chunk of a prompt decides
which of its tokens were seen plain.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import attrs
import mlx.core as mx

from draftloom.errors import MemoryGuardWarning, MemoryLimitError
from draftloom.memory import CacheCost, WorkShape, size_text

__all__ = ["Costs", "MemoryGuard", "check_weights"]

SMALLEST_STEP = 16
"""Prompt tokens below which a chunk is not cut."""
SMALL = 10**6
"""Bytes that are not worth a word."""
HINT = (
    "raise --memory-limit, or need less: a shorter prompt or --max-tokens, --kv-bits 8, a smaller "
    "or more quantized target"
)


@attrs.frozen(eq=False)
class Costs:
    """What a generation will need, by length.

    Attributes:
        caches: of the target.
        work: of one pass.
        context: (tokens) -> bytes of the drafter's session.
    """

    caches: tuple[CacheCost, ...]
    work: WorkShape
    context: Callable[[int], int] = lambda tokens: 0

    def caches_at(self, tokens: int) -> int:
        """Bytes of all caches that hold so many tokens."""
        return sum(cost.at(tokens) for cost in self.caches)

    def growing(self, tokens: int) -> int:
        """Bytes that the largest cache needs twice while it grows."""
        return max((cost.at(tokens) for cost in self.caches), default=0)


def check_weights(weights: int, drafter: int, caches: int, limit: int) -> bool:
    """Before anything is loaded: does it fit, with the drafter or without?

    Args:
        weights, drafter: bytes of both models once loaded (the drafter's context included).
        caches: bytes at the length that was asked for.
        limit: bytes that the process may hold.

    Returns:
        Whether the drafter fits as well.

    Raises:
        MemoryLimitError: not even the target does; has the numbers.
    """
    held = mx.get_active_memory()
    needed = held + weights + caches
    if needed > limit:
        also = f" and {size_text(caches)} of caches" if caches else ""
        used = f", {size_text(held)} are in use" if held > SMALL else ""
        raise MemoryLimitError(
            f"the target needs {size_text(weights)} of weights{also}{used}, the limit is "
            f"{size_text(limit)}",
            "raise --memory-limit, or need less: a shorter --context-length, --kv-bits 8, a "
            "smaller or more quantized target",
        )
    if not drafter or needed + drafter <= limit:
        return True
    _warn(
        f"no drafter: it needs {size_text(drafter)}, the target {size_text(needed)}, the limit is "
        f"{size_text(limit)}"
    )
    return False


class MemoryGuard:
    """Watches one generation.

    Args:
        limit: bytes that the process may hold; None watches nothing.
        costs: what it will need; None is not known: then only what is held already counts.
        step: prompt tokens to run at once.

    Attributes:
        shrunk: what was made smaller, and why.
        step: prompt tokens to run at once, as shrunk so far.
    """

    def __init__(self, limit: int | None, costs: Costs | None, step: int) -> None:
        self.limit = limit
        self.step = step
        self.shrunk: list[str] = []
        self._costs = costs
        self._context = True

    def begin(self, held: int, prompt_end: int, end: int, drafter: bool) -> bool:
        """Before a generation runs.

        Args:
            held: bytes of the caches it begins with.
            prompt_end, end: tokens in the caches after the prompt, and at the end of the text.
            drafter: whether there is one.

        Returns:
            Whether the drafter's context fits as well.

        Raises:
            MemoryLimitError: it does not fit in the smallest chunks and without a drafter.
        """
        if self.limit is None or self._costs is None:
            return drafter
        costs = self._costs
        self._context = drafter
        caches = max(0, costs.caches_at(end) - held)
        work = costs.work.at(min(SMALLEST_STEP, self.step), prompt_end) + costs.growing(end)
        base, context = self._active() + caches + work, costs.context(end) if drafter else 0
        if base > self.limit:
            raise MemoryLimitError(
                f"a text of {end} tokens needs {size_text(caches)} of caches and "
                f"{size_text(work)} to work besides the {size_text(self._active())} in use, the "
                f"limit is {size_text(self.limit)}",
                HINT,
            )
        if context and base + context > self.limit:
            self._context = False
            self._note(
                f"no drafter: its context of {end} tokens needs {size_text(context)}, "
                f"{size_text(self.limit - base)} of {size_text(self.limit)} are left"
            )
        return self._context

    def fits(self, position: int, tokens: int, at_once: int) -> bool:
        """Whether `tokens` more fit, some of them at once, when the caches hold `position`."""
        return self._lacking(position, tokens, at_once) <= 0

    def chunk(self, position: int, remaining: int) -> int:
        """Prompt tokens to run next, at most `remaining`; less than before where memory is short.

        Returns:
            0 where not even the smallest chunk fits.
        """
        tokens = min(self.step, remaining)
        smallest = min(SMALLEST_STEP, tokens)
        while (lacking := self._lacking(position, tokens, tokens)) > 0 and tokens > smallest:
            tokens = max(smallest, tokens // 2)
        if lacking > 0:
            return 0
        if tokens < min(self.step, remaining):
            self._note(
                f"the prompt runs {tokens} tokens at once instead of {self.step} from token "
                f"{position} on, to stay below {size_text(self.limit or 0)}"
            )
            self.step = tokens
        return tokens

    def refuse(self, position: int, tokens: int, at_once: int) -> str:
        """Why they do not fit, with the numbers."""
        lacking = self._lacking(position, tokens, at_once)
        return (
            f"{size_text(lacking)} more than the limit of {size_text(self.limit or 0)} are needed "
            f"to go on from token {position} ({size_text(self._active())} in use)"
        )

    def drop_drafter(self, position: int, tokens: int, at_once: int) -> str:
        """Note that the drafter is given up for them; returns the reason."""
        reason = f"no drafter from token {position} on: {self.refuse(position, tokens, at_once)}"
        self._context = False
        self._note(reason)
        return reason

    def _lacking(self, position: int, tokens: int, at_once: int) -> int:
        """Bytes that are lacking for `tokens` more; 0 or less where they fit."""
        if self.limit is None:
            return 0
        needed = self._active()
        if self._costs is not None:
            costs, end = self._costs, position + tokens
            needed += costs.caches_at(end) - costs.caches_at(position)
            needed += costs.work.at(min(tokens, at_once), end)
            if costs.caches_at(end) > costs.caches_at(position):
                needed += costs.growing(end)
            if self._context:
                needed += max(0, costs.context(end) - costs.context(position))
        return needed - self.limit

    def _active(self) -> int:
        """Bytes in use. What MLX keeps for later is given back first where that would matter."""
        active = mx.get_active_memory()
        if self.limit is not None and active + mx.get_cache_memory() > self.limit // 2:
            mx.clear_cache()
        return active

    def _note(self, text: str) -> None:
        self.shrunk.append(text)
        _warn(text)


def _warn(text: str) -> None:
    warnings.warn(f"short of memory: {text}", MemoryGuardWarning, stacklevel=3)
