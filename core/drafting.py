"""The drafter under guard: whatever it does wrong costs speed, never tokens.

An exception, a wrong shape or type, numbers that are not finite, ids outside the vocabulary: the
engine goes on with the target alone and says so once. What can be seen without the device is
checked here; values are checked on the device and read with the cycle's one read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import attrs
import mlx.core as mx

from draftloom.contracts import Draft, Drafter, DraftRequest, DraftSession
from draftloom.errors import DrafterFallbackWarning, DraftloomError, UsageError
from draftloom.events import GenerationStats
from draftloom.sampling import SamplingState

__all__ = ["GuardedDrafter", "UnusableDraftError", "one_line"]


class UnusableDraftError(Exception):
    """A draft whose numbers are not finite or whose ids are outside the vocabulary."""


class GuardedDrafter:
    """One generation's drafter session; gone once it has failed.

    Args:
        drafter: the drafter.
        vocab_size: V of the target.
        stats: told why the drafter was given up.

    Attributes:
        drafted: tokens of the last proposal, before any of them was left unverified.
    """

    def __init__(self, drafter: Drafter, vocab_size: int, stats: GenerationStats) -> None:
        self._drafter = drafter
        self._vocab_size = vocab_size
        self._stats = stats
        self._session: DraftSession | None = None
        self.drafted = 0

    @property
    def alive(self) -> bool:
        """Whether it can still propose."""
        return self._session is not None

    def open(self, request: DraftRequest) -> None:
        """Begin the generation."""
        try:
            self._session = self._drafter.open(request)
        except Exception as error:  # noqa: BLE001 a drafter may fail in any way
            self.give_up(one_line(error))

    def observe(self, committed: Sequence[int], features: mx.array | None) -> None:
        """Hand over committed tokens and their features [1, T, F], T at least their number."""
        if self._session is None:
            return
        rows = None if features is None else features[:, : len(committed)]
        try:
            self._session.observe((tuple(committed),), rows)
        except Exception as error:  # noqa: BLE001 a drafter may fail in any way
            self.give_up(one_line(error))

    def propose(self, anchor: mx.array, draft: int, verify: int, sampling: SamplingState) -> Draft:
        """A draft of at most `verify` tokens out of `draft` slots; empty when there is none."""
        self.drafted = 0
        if self._session is None or min(draft, verify) <= 0:
            return Draft.empty()
        try:
            proposal = self._session.propose(anchor, draft, sampling)
            self._check_shapes(proposal, draft)
        except Exception as error:  # noqa: BLE001 a drafter may fail in any way
            self.give_up(one_line(error))
            return Draft.empty()
        self.drafted = proposal.width
        return self._with_health(proposal.first(verify))

    def give_up(self, reason: str) -> None:
        """Go on with the target alone, and say so once."""
        self._session = None
        if not self._stats.fell_back:
            self._stats.fell_back = f"drafter {self._drafter.info.name!r} failed: {reason}"
            warnings.warn(
                f"{self._stats.fell_back}; going on with the target alone",
                DrafterFallbackWarning,
                stacklevel=2,
            )

    def _check_shapes(self, draft: Draft, width: int) -> None:
        tokens = draft.tokens
        if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] > width:
            raise UsageError(f"proposed tokens {tuple(tokens.shape)}, at most (1, {width}) fit")
        if not mx.issubdtype(tokens.dtype, mx.integer):
            raise UsageError(f"proposed tokens of type {tokens.dtype}, integers are needed")
        for name, rows in (("probs", draft.probs), ("candidates", draft.candidates)):
            if rows is not None and rows.shape[:2] != tokens.shape:
                raise UsageError(f"{name} {tuple(rows.shape)} do not fit {tuple(tokens.shape)}")

    def _with_health(self, draft: Draft) -> Draft:
        """Lazily: are all ids in the vocabulary and all numbers finite? Ids are clipped, so that
        verifying a bad one is harmless."""
        if not draft.width:
            return draft
        tokens, vocab = draft.tokens, self._vocab_size
        healthy = mx.all((tokens >= 0) & (tokens < vocab), axis=1)
        if draft.healthy is not None:
            healthy = healthy & draft.healthy
        if draft.probs is not None:
            healthy = healthy & mx.all(mx.isfinite(draft.probs), axis=(1, 2))
        clipped = mx.clip(tokens, 0, vocab - 1).astype(mx.int32)
        return attrs.evolve(draft, tokens=clipped, healthy=healthy)


def one_line(error: BaseException) -> str:
    """An exception as one line, with its type unless the text is meant for users."""
    text = " ".join(str(error).split())
    if isinstance(error, DraftloomError | UnusableDraftError):
        return text
    return f"{type(error).__name__}: {text}"
