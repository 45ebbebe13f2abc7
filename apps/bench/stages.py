"""Where the time of a cycle goes: passes of their own that wait for the device after every stage.

The parts of a built pipeline are wrapped; the engine's loop is as it is. Waiting takes away the
overlap of host and device that the timed runs have, so that the stages' sum is more than a cycle
of those takes. What a cycle spends outside the stages is the host's.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import mlx.core as mx

from draftloom.abilities import Resolvable
from draftloom.contracts import (
    AcceptancePolicy,
    Draft,
    Drafter,
    DraftRequest,
    DraftSession,
    Speculation,
    TargetAdapter,
    TargetOutput,
    Verifier,
)
from draftloom.drafting import propose_first
from draftloom.errors import UsageError
from draftloom.pipeline import Pipeline
from draftloom.recording import made_of
from draftloom.sampling import SamplingParams, SamplingState

from .prompts import EncodedPrompt

__all__ = ["STAGES", "StageTimes", "all_repeats", "time_stages"]

STAGES = ("draft", "verify", "accept", "rollback", "host")


@attrs.frozen
class StageTimes:
    """Sums over the cycles of instrumented passes.

    Attributes:
        variant: its name.
        length: tokens asked for a prompt.
        cycles: cycles after the prompts' own tokens.
        accepted: draft tokens accepted in them.
        seconds: by stage, the device waited for after each.
        limits: tokens a second if a cycle were its draft and its verify and nothing else, of each
            pass; 0.0 where it had no such cycle.
    """

    variant: str
    length: int
    cycles: int
    accepted: int
    seconds: dict[str, float]
    limits: tuple[float, ...]

    @classmethod
    def one_pass(cls, texts: Sequence[StageTimes]) -> StageTimes:
        """The texts of one variant and length as one pass over all of them."""
        total = {stage: sum(one.seconds[stage] for one in texts) for stage in STAGES}
        cycles, accepted = sum(one.cycles for one in texts), sum(one.accepted for one in texts)
        forward = total["draft"] + total["verify"]
        limit = (cycles + accepted) / forward if forward else 0.0
        return cls(texts[0].variant, texts[0].length, cycles, accepted, total, (limit,))


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, stage: str, call: Callable[[], Any], arrays: Callable[[Any], Any]) -> Any:
        """Call, wait for the arrays of the result, and count the time."""
        begin = time.perf_counter()
        result = call()
        mx.eval(arrays(result))
        self.seconds[stage] += time.perf_counter() - begin
        return result

    def launched(self, stage: str, call: Callable[[], None]) -> None:
        """Call, wait for what it gave the device to do, and count the time. What it leaves lazy is
        the work of whoever computes it."""
        begin = time.perf_counter()
        call()
        mx.synchronize()
        self.seconds[stage] += time.perf_counter() - begin


def _given(*arrays: Any) -> list[Any]:
    return [array for array in arrays if array is not None]


def _states(cache: Sequence[Any]) -> list[Any]:
    return [array for entry in cache for array in _given(*made_of(entry))]


class _Session:
    def __init__(self, session: DraftSession, clock: _Clock) -> None:
        self._session, self._clock = session, clock

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        self._clock.timed(
            "draft", lambda: self._session.observe(committed, features), lambda none: []
        )

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        return self.propose_first(anchor, width, width, sampling)

    def propose_first(
        self, anchor: mx.array, width: int, count: int, sampling: SamplingState
    ) -> Draft:
        return self._clock.timed(
            "draft",
            lambda: propose_first(self._session, anchor, width, count, sampling),
            lambda draft: _given(draft.tokens, draft.probs, draft.candidates, draft.healthy),
        )


class _Drafter:
    def __init__(self, drafter: Drafter, clock: _Clock) -> None:
        self._drafter, self._clock = drafter, clock
        self.info = drafter.info

    def open(self, request: DraftRequest) -> _Session:
        return _Session(self._drafter.open(request), self._clock)


class _Verifier:
    def __init__(self, verifier: Verifier, clock: _Clock) -> None:
        self._verifier, self._clock = verifier, clock
        self.info = verifier.info

    def verify(
        self, target: TargetAdapter, block: mx.array, speculation: Speculation
    ) -> TargetOutput:
        return self._clock.timed(
            "verify",
            lambda: self._verifier.verify(target, block, speculation),
            lambda output: [*_given(output.logits, output.features), *_states(speculation.cache)],
        )


class _Acceptance:
    def __init__(self, policy: AcceptancePolicy, clock: _Clock) -> None:
        self._policy, self._clock = policy, clock
        self.info = policy.info

    def resolve(self, params: SamplingParams) -> _Acceptance:
        if isinstance(self._policy, Resolvable):
            return _Acceptance(self._policy.resolve(params), self._clock)
        return self

    def accept(
        self, draft: Draft, logits: mx.array, sampling: SamplingState
    ) -> tuple[mx.array, mx.array]:
        return self._clock.timed(
            "accept", lambda: self._policy.accept(draft, logits, sampling), list
        )


class _Speculation:
    def __init__(self, inner: Speculation, clock: _Clock) -> None:
        self._inner, self._clock = inner, clock
        self.cache = inner.cache

    @property
    def block(self) -> mx.array:
        return self._inner.block

    @block.setter
    def block(self, tokens: mx.array) -> None:
        self._inner.block = tokens

    def commit(self, num_accepted: Sequence[int]) -> None:
        self._clock.launched("rollback", lambda: self._inner.commit(num_accepted))

    def abort(self) -> None:
        self._clock.launched("rollback", self._inner.abort)


def _instrumented(pipeline: Pipeline, clock: _Clock) -> Pipeline:
    """The same pipeline over parts that count their time. What cycles take here, waited for, is not
    for its width policy to learn from: it has one of its own."""
    parts = pipeline._parts  # an application of this project; users have no need of it
    try:
        width = copy.deepcopy(parts.width)
    except TypeError as error:
        raise UsageError(
            f"width policy {parts.width.info.name!r} cannot be copied ({error}), which timing the "
            "stages needs",
            "use --no-stages",
        ) from error

    def open_speculation(cache: list[Any], block: mx.array) -> _Speculation:
        inner = clock.timed(
            "rollback", lambda: parts.open_speculation(cache, block), lambda spec: []
        )
        return _Speculation(inner, clock)

    wrapped = attrs.evolve(
        parts,
        drafter=_Drafter(parts.drafter, clock),
        verifier=_Verifier(parts.verifier, clock),
        acceptance=_Acceptance(parts.acceptance, clock),
        open_speculation=open_speculation,
        width=width,
    )
    return Pipeline(pipeline.spec, wrapped, pipeline.tokenizer, pipeline.sampling, pipeline.names)


def time_stages(
    variant: str,
    pipeline: Pipeline,
    prompts: Sequence[EncodedPrompt],
    length: int,
    stop_at_eos: bool = False,
    warm_up: int = 0,
) -> StageTimes:
    """Run the prompts once more, waiting after every stage. The pipeline stays usable.

    Args:
        variant: its name.
        pipeline: built.
        prompts: at least one.
        length: tokens a prompt at most.
        stop_at_eos: as in the timed runs.
        warm_up: tokens that are written before, not timed: a pipeline just built has still to
            trace its passes, and may have to compile kernels.
    """
    clock = _Clock()
    wrapped = _instrumented(pipeline, clock)
    if warm_up:
        wrapped.generate(
            prompts[0].ids,
            max_tokens=warm_up,
            ignore_eos=True,
            temperature=0.0,
            xtc_probability=0.0,
        )
    texts = []
    for prompt in prompts:
        stream = wrapped.stream(
            prompt.ids,
            max_tokens=length,
            ignore_eos=not stop_at_eos,
            temperature=0.0,
            xtc_probability=0.0,
        )
        begin = time.perf_counter()
        for chunk in stream:
            if chunk.cycle.index == 0:  # the prompt's part ends here
                clock.seconds.clear()
                begin = time.perf_counter()
        wall = time.perf_counter() - begin
        seconds = {stage: clock.seconds[stage] for stage in STAGES}
        seconds["host"] = max(wall - sum(seconds.values()), 0.0)
        count = stream.stats.cycles
        if count > 1:  # the first cycle's draft came before the clock: the others stand for it
            seconds["draft"] *= count / (count - 1)
        texts.append(StageTimes(variant, length, count, stream.stats.accepted, seconds, ()))
    return StageTimes.one_pass(texts)


def all_repeats(passes: Sequence[StageTimes]) -> list[StageTimes]:
    """Those of each variant and length together: sums, and the limits of all."""
    groups: dict[tuple[str, int], list[StageTimes]] = {}
    for one in passes:
        groups.setdefault((one.variant, one.length), []).append(one)
    return [
        StageTimes(
            *key,
            sum(one.cycles for one in group),
            sum(one.accepted for one in group),
            {stage: sum(one.seconds[stage] for one in group) for stage in STAGES},
            tuple(limit for one in group for limit in one.limits),
        )
        for key, group in groups.items()
    ]
