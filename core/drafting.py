"""The drafter under guard: whatever it does wrong costs speed, never tokens.

An exception, a wrong shape or type, numbers that are not finite, ids outside the vocabulary: the
engine goes on with the target alone and says so once. What can be seen without the device is
checked here; values are checked on the device and read with the cycle's one read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import reduce
from operator import add, and_

import attrs
import mlx.core as mx

from draftloom.abilities import DraftsAhead, DraftsInPart
from draftloom.contracts import Draft, Drafter, DraftLaw, DraftRequest, DraftSession
from draftloom.errors import DrafterFallbackWarning, DraftloomError, UsageError
from draftloom.events import GenerationStats
from draftloom.memory import UsesMemory
from draftloom.sampling import SamplingState

__all__ = ["GuardedDrafter", "UnusableDraftError", "all_finite", "one_line", "propose_first"]


class UnusableDraftError(Exception):
    """A draft whose numbers are not finite or whose ids are outside the vocabulary."""


class GuardedDrafter:
    """One generation's drafter session; gone once it has failed.

    Args:
        drafter: the drafter.
        vocab_size: V of the target.
        stats: told why the drafter was given up.
    """

    def __init__(self, drafter: Drafter, vocab_size: int, stats: GenerationStats) -> None:
        self._drafter = drafter
        self._vocab_size = vocab_size
        self._stats = stats
        self._session: DraftSession | None = None
        self._early: DraftsAhead | None = None

    @property
    def alive(self) -> bool:
        """Whether it can still propose."""
        return self._session is not None

    @property
    def ahead(self) -> bool:
        """Whether the session can draft before it is known what was kept."""
        return self._session is not None and self._early is not None and self._early.ahead

    def open(self, request: DraftRequest) -> None:
        """Begin the generation."""
        try:
            self._session = self._drafter.open(request)
            if self._session is None:
                raise UsageError("open() returned no session")
            # Asking a protocol takes long enough not to do it in every cycle.
            self._early = self._session if isinstance(self._session, DraftsAhead) else None
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
        if self._session is None or min(draft, verify) <= 0:
            return Draft.empty()
        try:
            proposal = propose_first(self._session, anchor, draft, min(verify, draft), sampling)
            _check_shapes(proposal, draft, self._vocab_size)
            return self._with_health(proposal.first(verify))
        except Exception as error:  # noqa: BLE001 a drafter may fail in any way
            self.give_up(one_line(error))
            return Draft.empty()

    def launch_ahead(
        self, features: mx.array | None, kept: mx.array, anchor: mx.array, draft: int, verify: int
    ) -> None:
        """Launch the next draft before it is known how many tokens are `kept` ([1] int32), if the
        session can. `observe` and `propose` follow as ever."""
        early = self._early if self._session is not None else None
        if early is None or features is None or min(draft, verify) <= 0:
            return
        try:
            tokens = early.propose_ahead(features, kept, anchor, draft, min(verify, draft))
            if tokens is not None:
                mx.async_eval(tokens)
        except Exception as error:  # noqa: BLE001 a drafter may fail in any way
            self.give_up(one_line(error))

    def drop(self, reason: str) -> None:
        """Go on with the target alone for a reason that is not the drafter's; it was said."""
        self._session = None
        self._stats.fell_back = self._stats.fell_back or reason

    def memory(self) -> int:
        """Bytes that the session says it holds."""
        if not isinstance(self._session, UsesMemory):
            return 0
        return sum(self._session.memory().values())

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

    def _with_health(self, draft: Draft) -> Draft:
        """Lazily: are all ids in the vocabulary and all numbers finite? Ids that may not be are
        clipped, so that using a bad one is harmless."""
        if not draft.width:
            return draft
        tokens, candidates, found = draft.tokens, draft.candidates, []
        below = draft.ids_below
        if below is None or below > self._vocab_size or tokens.dtype != mx.int32:
            tokens, inside = self._clip(tokens)
            found.append(inside)
            if candidates is not None:
                candidates, inside = self._clip(candidates)
                found.append(inside)
        if draft.probs is not None:
            found.append(all_finite(draft.probs))
        if not found and draft.source:
            return draft
        if draft.healthy is not None:
            found.append(draft.healthy.astype(mx.bool_))
        return attrs.evolve(
            draft,
            source=draft.source or self._drafter.info.name,
            tokens=tokens,
            candidates=candidates,
            healthy=reduce(and_, found) if found else None,
        )

    def _clip(self, ids: mx.array) -> tuple[mx.array, mx.array]:
        """Ids inside the vocabulary, int32, and whether all were, [1]. (Every operation is a launch
        on a GPU, and this is done in every cycle.)"""
        clipped = mx.clip(ids, 0, self._vocab_size - 1)
        return clipped.astype(mx.int32), (clipped == ids).reshape(1, -1).all(axis=1)


def propose_first(
    session: DraftSession, anchor: mx.array, width: int, count: int, sampling: SamplingState
) -> Draft:
    """The first `count` of up to `width` tokens of a session, by its own means if it has any."""
    if count < width and isinstance(session, DraftsInPart):
        return session.propose_first(anchor, width, count, sampling)
    return session.propose(anchor, width, sampling)


def _check_shapes(draft: Draft, width: int, vocab_size: int) -> None:
    tokens, law = draft.tokens, draft.law
    if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] > width:
        raise UsageError(f"proposed tokens {tuple(tokens.shape)}, at most (1, {width}) fit")
    if not mx.issubdtype(tokens.dtype, mx.integer):
        raise UsageError(f"proposed tokens of type {tokens.dtype}, integers are needed")
    needs = {
        "probs": (draft.probs, law is not DraftLaw.DETERMINISTIC),
        "candidates": (draft.candidates, law is DraftLaw.TOP_K),
    }
    for name, (rows, needed) in needs.items():
        if (rows is None) == needed:
            raise UsageError(f"a {law} draft {'has no' if needed else 'must not have'} {name}")
        if rows is not None and (rows.ndim != 3 or rows.shape[:2] != tokens.shape):
            raise UsageError(f"{name} {tuple(rows.shape)} do not fit {tuple(tokens.shape)}")
    if draft.probs is not None:
        wanted = vocab_size if draft.candidates is None else draft.candidates.shape[-1]
        if draft.probs.shape[-1] != wanted:
            raise UsageError(f"a q row has {draft.probs.shape[-1]} entries, {wanted} are needed")
    if draft.lengths is not None and draft.lengths.shape != (1,):
        raise UsageError(f"lengths is {tuple(draft.lengths.shape)}, one number a row is needed")
    if draft.healthy is not None and draft.healthy.shape != (1,):
        raise UsageError(f"healthy is {tuple(draft.healthy.shape)}, one flag a row is needed")


def all_finite(*arrays: mx.array) -> mx.array:
    """Whether all numbers of each row are finite, [B] bool, of floating arrays [B, ...].

    x - x is 0 where x is finite and NaN elsewhere. That is two launches an array on a GPU;
    `mx.isfinite` is seven, and this is asked in every cycle. Not for use inside `mx.compile`: a
    compiler that takes all numbers for finite may make 0 of x - x.
    """
    rests = [(x - x).sum(axis=tuple(range(1, x.ndim))) for x in arrays]
    return reduce(add, rests) == 0


def one_line(error: BaseException) -> str:
    """An exception as one line, with its type unless the text is meant for users."""
    text = " ".join(str(error).split())
    if isinstance(error, DraftloomError | UnusableDraftError):
        return text
    return f"{type(error).__name__}: {text}"
