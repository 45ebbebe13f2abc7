"""Cascade: the first drafter that has something to propose wins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
import mlx.core as mx

from draftloom.abilities import Bindable, BindContext, Checkable
from draftloom.contracts import (
    ComponentInfo,
    Draft,
    Drafter,
    DraftLaw,
    DraftRequest,
    DraftSession,
    Need,
    TargetInfo,
)
from draftloom.drafting import propose_first
from draftloom.errors import Problem
from draftloom.memory import KeepsContext, UsesMemory
from draftloom.sampling import SamplingState

__all__ = ["CascadeDrafter"]


class CascadeDrafter:
    """Asks drafters in order, cheap ones first.

    Args:
        stages: drafters, in the order they are asked.

    Raises:
        ValueError: no stage, or two that read different layers of the target.
    """

    info = ComponentInfo(
        "cascade",
        "the first stage that proposes wins",
        nested_options=("stages",),
    )

    def __init__(self, stages: Sequence[Drafter]) -> None:
        if not stages:
            raise ValueError("a cascade needs at least one stage")
        self._stages = tuple(stages)
        taps = {stage.info.tap_layers for stage in stages if stage.info.tap_layers}
        if len(taps) > 1:
            raise ValueError(f"two stages read different layers: {sorted(taps)}")
        laws = {stage.info.law for stage in stages}
        limits = [stage.info.max_width for stage in stages]
        self.info = attrs.evolve(
            type(self).info,
            name="cascade(" + ", ".join(stage.info.name for stage in stages) + ")",
            needs=(Need.TAPS,) if taps else (),
            law=DraftLaw.DENSE if laws - {DraftLaw.DETERMINISTIC} else DraftLaw.DETERMINISTIC,
            tap_layers=next(iter(taps), ()),
            default_width=max(stage.info.default_width for stage in stages),
            max_width=None if None in limits else max(w for w in limits if w is not None),
            details="; ".join(stage.info.details for stage in stages if stage.info.details),
            paired=tuple(source for stage in stages for source in stage.info.paired),
        )

    def check(self, target: TargetInfo) -> Iterable[Problem]:
        """Problems of every stage."""
        for stage in self._stages:
            if isinstance(stage, Checkable):
                yield from stage.check(target)

    def bind(self, context: BindContext) -> None:
        """Bind every stage."""
        for stage in self._stages:
            if isinstance(stage, Bindable):
                stage.bind(context)

    def memory(self) -> dict[str, int]:
        """Bytes of the weights of all stages."""
        held = [stage.memory() for stage in self._stages if isinstance(stage, UsesMemory)]
        return {"weights": sum(sum(part.values()) for part in held)}

    def context_bytes(self, tokens: int) -> int:
        """Bytes that the sessions of all stages hold for so many tokens."""
        stages = [stage for stage in self._stages if isinstance(stage, KeepsContext)]
        return sum(stage.context_bytes(tokens) for stage in stages)

    def open(self, request: DraftRequest) -> _Session:
        """Begin a generation."""
        limits = [stage.info.max_width for stage in self._stages]
        return _Session([stage.open(request) for stage in self._stages], limits)


class _Session:
    """Every stage observes everything, so that each is ready when the ones before it pass."""

    def __init__(self, sessions: Sequence[DraftSession], limits: Sequence[int | None]) -> None:
        self._sessions = sessions
        self._limits = limits

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        for session in self._sessions:
            session.observe(committed, features)

    def memory(self) -> dict[str, int]:
        held = [session.memory() for session in self._sessions if isinstance(session, UsesMemory)]
        return {"context": sum(sum(part.values()) for part in held)}

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        return self.propose_first(anchor, width, width, sampling)

    def propose_first(
        self, anchor: mx.array, width: int, count: int, sampling: SamplingState
    ) -> Draft:
        for session, limit in zip(self._sessions, self._limits, strict=True):
            slots = width if limit is None else min(width, limit)
            draft = propose_first(session, anchor, slots, count, sampling)
            if draft.width:
                return draft
        return Draft.empty(anchor.shape[0])
