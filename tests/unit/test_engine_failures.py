"""What fails in a cycle: a drafter costs speed, never tokens; anything else loses nothing."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import pytest

from draftloom import (
    ComponentInfo,
    Draft,
    DrafterFallbackWarning,
    DraftLaw,
    GenerationError,
    Port,
    Width,
    hookimpl,
)
from draftloom.verifiers.block import BlockVerifier

from .fakes import (
    PROMPT,
    VOCAB,
    Offer,
    Scripted,
    fresh_cache,
    half_right,
    model,
    pipeline_of,
    plain,
    same_caches,
)

COUNT = 16
INT = mx.int32


@cache
def answer(family: str = "attention") -> tuple[int, ...]:
    return plain(model(family), PROMPT, COUNT)


def hand_out(stream: Any, into: list[int]) -> None:
    """Take a stream's tokens one chunk at a time, as far as it goes."""
    for chunk in stream:
        into.extend(chunk.token_ids)


class Observer:
    """Notes the observing hooks."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    @hookimpl
    def cycle_finished(self, event: Any) -> None:
        self.events.append(("cycle", event))

    @hookimpl
    def generation_finished(self, event: Any) -> None:
        self.events.append(("finished", event))

    @hookimpl
    def generation_failed(self, event: Any) -> None:
        self.events.append(("failed", event))

    def all(self, kind: str) -> list[Any]:
        """The events of a kind."""
        return [event for k, event in self.events if k == kind]


# --- drafters --------------------------------------------------------------------------------


class Misbehaving(Scripted):
    """Half right, until its n-th call of one method does something wrong."""

    def __init__(self, method: str, at: int, wrong: Callable[[], Any], family: str) -> None:
        super().__init__(half_right(answer(family), 2)._script)
        self._method, self._left, self._wrong = method, at, wrong

    def _now(self, method: str) -> bool:
        if method == self._method:
            self._left -= 1
        return method == self._method and self._left < 0

    def open(self, request: Any) -> Any:
        return self._wrong() if self._now("open") else super().open(request)

    def observe(self, committed: Any, features: Any) -> None:
        super().observe(committed, features)
        if self._now("observe"):
            self._wrong()

    def propose(self, anchor: mx.array, width: int, sampling: Any) -> Draft:
        good = super().propose(anchor, width, sampling)
        return self._wrong() if self._now("propose") else good


def fail() -> Any:
    raise OSError("the drafter's\nfile is gone")


def proposal(tokens: Any, **parts: Any) -> Callable[[], Draft]:
    return lambda: Draft(tokens if isinstance(tokens, mx.array) else mx.array(tokens), **parts)


def dense(value: float, vocabulary: int = VOCAB) -> mx.array:
    return mx.full((1, 2, vocabulary), value)


TWO = mx.array([[1, 2]])
TOP = mx.full((1, 2, 3), 1 / 3)
FAILURES = {
    "open raises": ("open", fail, "OSError: the drafter's file is gone"),
    "open gives nothing": ("open", lambda: None, ""),
    "observe raises": ("observe", fail, "OSError: the drafter's file is gone"),
    "propose raises": ("propose", fail, "OSError: the drafter's file is gone"),
    "nothing": ("propose", lambda: None, ""),
    "a list": ("propose", lambda: [[1, 2]], ""),
    "one dimension": ("propose", proposal([1, 2]), "(2,)"),
    "two rows": ("propose", proposal([[1], [2]]), "(2, 1)"),
    "too wide": ("propose", proposal([[1] * 5]), "(1, 5)"),
    "floats": ("propose", proposal([[1.0, 2.0]]), "float32"),
    "booleans": ("propose", proposal([[True]]), "bool"),
    "id V": ("propose", proposal([[1, VOCAB]]), "outside the vocabulary"),
    "id -1": ("propose", proposal([[-1, 2]]), "outside the vocabulary"),
    "id 2**40": ("propose", proposal(mx.array([[2**40]], dtype=mx.int64)), "outside"),
    "id 2**32": ("propose", proposal(mx.array([[2**32]], dtype=mx.int64)), "outside"),
    "id V, below V + 1": (
        "propose", proposal([[1, VOCAB]], ids_below=VOCAB + 1), "outside the vocabulary",
    ),
    "unhealthy": ("propose", proposal(TWO, healthy=mx.array([False])), "not finite"),
    "unhealthy, ids in bounds": (
        "propose", proposal(TWO, healthy=mx.array([False]), ids_below=VOCAB), "not finite",
    ),
    "NaN rows, ids in bounds": (
        "propose",
        proposal(TWO, law=DraftLaw.DENSE, probs=dense(mx.nan), ids_below=VOCAB),
        "not finite",
    ),
    "health of another shape": ("propose", proposal(TWO, healthy=mx.array([True] * 2)), ""),
    "law without rows": ("propose", proposal(TWO, law=DraftLaw.DENSE), ""),
    "flat rows": ("propose", proposal(TWO, law=DraftLaw.DENSE, probs=mx.ones((1, 2))), ""),
    "rows of another vocabulary": (
        "propose", proposal(TWO, law=DraftLaw.DENSE, probs=dense(0.1, VOCAB + 1)), "",
    ),
    "rows of one": ("propose", proposal(TWO, law=DraftLaw.DENSE, probs=dense(0.5, 1)), ""),
    "rows too few": (
        "propose", proposal([[1, 2, 3]], law=DraftLaw.DENSE, probs=dense(0.1)), "",
    ),
    "NaN rows": (
        "propose", proposal(TWO, law=DraftLaw.DENSE, probs=dense(mx.nan)), "not finite",
    ),
    "infinite rows": (
        "propose", proposal(TWO, law=DraftLaw.DENSE, probs=dense(mx.inf)), "not finite",
    ),
    "top-k without candidates": ("propose", proposal(TWO, law=DraftLaw.TOP_K, probs=TOP), ""),
    "candidate V": (
        "propose",
        proposal(TWO, law=DraftLaw.TOP_K, probs=TOP, candidates=mx.full((1, 2, 3), VOCAB, INT)),
        "outside the vocabulary",
    ),
    "candidate -1": (
        "propose",
        proposal(TWO, law=DraftLaw.TOP_K, probs=TOP, candidates=mx.full((1, 2, 3), -1, INT)),
        "outside the vocabulary",
    ),
}  # fmt: skip


def run_with(drafter: Any, family: str, acceptance: str = "auto", **options: Any) -> Any:
    """Result, caches, warnings and observed events of a generation."""
    observer = Observer()
    with (
        pipeline_of(
            drafter,
            observer,
            target=model(family),
            configure=lambda b: b.acceptance(acceptance),
        ) as pipeline,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        stream = pipeline.stream(PROMPT, max_tokens=COUNT, **options)
        tokens = tuple(t for chunk in stream for t in chunk.token_ids)
    told = [w for w in said if issubclass(w.category, DrafterFallbackWarning)]
    return tokens, stream, told, observer


@pytest.mark.parametrize(
    ("name", "at"),
    [(name, at) for name in FAILURES for at in (0, 2) if not (at and name.startswith("open"))],
)
@pytest.mark.parametrize("acceptance", ["greedy", "speculative-sampling"])
def test_a_failing_drafter_costs_no_token(name: str, at: int, acceptance: str) -> None:
    method, wrong, reason = FAILURES[name]
    drafter = Misbehaving(method, at, wrong, "attention")
    tokens, stream, told, observer = run_with(drafter, "attention", acceptance)
    assert tokens == answer()
    assert stream.stats.fell_back.startswith("drafter 'scripted' failed: ")
    assert reason in stream.stats.fell_back
    assert "\n" not in stream.stats.fell_back
    assert len(told) == 1
    assert stream.stats.fell_back in str(told[0].message)
    assert "going on with the target alone" in str(told[0].message)
    assert same_caches(stream.cache, fresh_cache(model(), (*PROMPT, *tokens)[:-1]))
    assert not observer.all("failed")
    assert [stats.generated_tokens for stats in observer.all("finished")] == [COUNT]


@pytest.mark.parametrize("rollback", ["auto", "snapshot"])
@pytest.mark.parametrize("name", ["propose raises", "id V", "rows of another vocabulary"])
def test_the_caches_of_a_hybrid_survive_a_failing_drafter(name: str, rollback: str) -> None:
    method, wrong, _ = FAILURES[name]
    drafter = Misbehaving(method, 1, wrong, "hybrid")
    tokens: list[int] = []
    with pipeline_of(
        drafter,
        target=model("hybrid"),
        configure=lambda b: b.acceptance("speculative-sampling").rollback(rollback),
    ) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        with pytest.warns(DrafterFallbackWarning):
            hand_out(stream, tokens)
    assert tuple(tokens) == answer("hybrid")
    assert same_caches(stream.cache, fresh_cache(model("hybrid"), (*PROMPT, *tokens)[:-1]))


def test_sampling_goes_on_after_a_fall_back() -> None:
    method, wrong, _ = FAILURES["NaN rows"]
    tokens, stream, told, _ = run_with(
        Misbehaving(method, 1, wrong, "attention"), "attention", temperature=1.0, seed=3
    )
    assert len(tokens) == COUNT
    assert set(tokens) <= set(range(VOCAB))
    assert len(told) == 1
    assert "not finite" in stream.stats.fell_back


def test_a_drafter_that_was_given_up_is_not_asked_again() -> None:
    drafter = Misbehaving("propose", 1, fail, "attention")
    run_with(drafter, "attention")
    assert len(drafter.asked) == 2
    told = len(drafter.observed)
    assert told == 3, "two parts of the prompt and one cycle"


def test_two_faults_in_one_cycle_are_told_once() -> None:
    """The draft is unusable, and the drafter fails again when it is told what came instead."""

    class Doubly(Misbehaving):
        def observe(self, committed: Any, features: Any) -> None:
            super().observe(committed, features)
            if len(self.asked) == 2:
                raise OSError("and again")

    drafter = Doubly("propose", 1, proposal([[1, VOCAB]]), "attention")
    tokens, stream, told, _ = run_with(drafter, "attention")
    assert tokens == answer()
    assert len(told) == 1
    assert stream.stats.fell_back


def test_the_next_generation_tries_the_drafter_again() -> None:
    drafter = Misbehaving("propose", 1, fail, "attention")
    with pipeline_of(drafter) as pipeline:
        with pytest.warns(DrafterFallbackWarning):
            first = pipeline.generate(PROMPT, max_tokens=COUNT)
        drafter._left = 1000
        second = pipeline.generate(PROMPT, max_tokens=COUNT)
    assert first.stats.fell_back
    assert not second.stats.fell_back
    assert first.token_ids == second.token_ids
    assert second.stats.accepted > first.stats.accepted


@pytest.mark.parametrize("dtype", [mx.uint32, mx.int64, mx.int16, mx.uint8], ids=str)
def test_any_integers_will_do(dtype: mx.Dtype) -> None:
    text = [*PROMPT, *answer()]

    def script(known: list[int], width: int) -> Draft:
        block = text[len(known) : len(known) + width] or [0]
        return Draft(mx.array([block], dtype=dtype))

    tokens, stream, told, _ = run_with(Scripted(script), "attention")
    assert tokens == answer()
    assert not told
    assert stream.stats.acceptance_rate > 0.9


def test_a_drafter_that_is_interrupted_does_interrupt() -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_with(Misbehaving("propose", 1, interrupt, "attention"), "attention")


# --- the target ------------------------------------------------------------------------------


class Breaks(BlockVerifier):
    """Verifies, and from its n-th call on (for so many calls) raises after the target has run."""

    info = ComponentInfo("breaks")

    def __init__(self, at: int, error: type[BaseException] = RuntimeError, times: int = 99) -> None:
        self._at, self._error, self._times, self._calls = at, error, times, -1

    def verify(self, target: Any, block: mx.array, speculation: Any) -> Any:
        output = super().verify(target, block, speculation)
        mx.eval(output.logits, [entry.state for entry in speculation.cache])
        self._calls += 1
        if self._at <= self._calls < self._at + self._times:
            raise self._error("out of\nmemory")
        return output


def broken_run(
    at: int, family: str, rollback: str = "auto", drafter: Any = None, verifier: Any = None
) -> tuple[tuple[int, ...], Any, BaseException, Observer]:
    """Tokens handed out, the stream, the error and the events of a run that breaks."""
    observer, handed = Observer(), []
    with pipeline_of(
        drafter or half_right(answer(family), 2),
        observer,
        Offer(verifier={"breaks": verifier or Breaks(at)}),
        target=model(family),
        configure=lambda b: b.verifier("breaks").rollback(rollback),
    ) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        with pytest.raises((GenerationError, KeyboardInterrupt)) as caught:
            hand_out(stream, handed)
    return tuple(handed), stream, caught.value, observer


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize(
    ("family", "rollback"),
    [("attention", "auto"), ("attention", "snapshot"), ("hybrid", "auto"), ("hybrid", "snapshot")],
)
def test_a_failing_target_loses_nothing(family: str, rollback: str, at: int) -> None:
    handed, stream, error, observer = broken_run(at, family, rollback)
    assert isinstance(error, GenerationError)
    assert "RuntimeError: out of memory" in str(error)
    assert handed == answer(family)[: len(handed)]
    assert len(handed) == (0 if at == 0 else 1 + 3 * (at - 1))
    held = (*PROMPT, *handed)[:-1]
    assert same_caches(stream.cache, fresh_cache(model(family), held))
    assert not stream.stats.fell_back, "the drafter is not to blame"
    (failure,) = observer.all("failed")
    assert failure.message == str(error)
    assert failure.generated_tokens == len(handed)
    assert not observer.all("finished")


def test_the_error_carries_the_tokens_so_far() -> None:
    handed, _, error, _ = broken_run(3, "attention")
    assert len(handed) == 7
    assert isinstance(error, GenerationError)
    assert error.token_ids == handed


def test_after_a_failure_the_text_goes_on_from_the_caches() -> None:
    handed, stream, _, _ = broken_run(2, "hybrid")
    with pipeline_of(target=model("hybrid")) as pipeline:
        rest = pipeline.generate(handed[-1:], max_tokens=COUNT - len(handed), cache=stream.cache)
    assert handed + rest.token_ids == answer("hybrid")


@pytest.mark.parametrize("family", ["attention", "hybrid"])
def test_a_target_that_fails_once_is_asked_again_without_the_draft(family: str) -> None:
    observer = Observer()
    with (
        pipeline_of(
            half_right(answer(family), 2),
            observer,
            Offer(verifier={"breaks": Breaks(2, times=1)}),
            target=model(family),
            configure=lambda b: b.verifier("breaks"),
        ) as pipeline,
        pytest.warns(DrafterFallbackWarning, match="out of memory"),
    ):
        result = pipeline.generate(PROMPT, max_tokens=COUNT)
    assert result.token_ids == answer(family)
    assert not observer.all("failed")


@pytest.mark.parametrize("family", ["attention", "hybrid"])
@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupt_inside_a_cycle_takes_it_back(family: str, at: int) -> None:
    verifier = Breaks(at, KeyboardInterrupt)
    handed, stream, error, observer = broken_run(at, family, verifier=verifier)
    assert isinstance(error, KeyboardInterrupt)
    held = (*PROMPT, *handed)[:-1]
    assert same_caches(stream.cache, fresh_cache(model(family), held))
    assert not observer.all("failed")


def test_an_interrupt_while_a_failed_cycle_is_tried_again() -> None:
    class FailsThenInterrupts(Breaks):
        def verify(self, target: Any, block: mx.array, speculation: Any) -> Any:
            if self._calls == self._at:
                self._error = KeyboardInterrupt
            return super().verify(target, block, speculation)

    verifier = FailsThenInterrupts(2)
    handed, stream, error, _ = broken_run(2, "attention", verifier=verifier)
    assert isinstance(error, KeyboardInterrupt)
    assert same_caches(stream.cache, fresh_cache(model(), (*PROMPT, *handed)[:-1]))


def test_a_target_that_fails_on_the_prompt() -> None:
    target = model()

    class Broken(type(target)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no memory for the prompt")

    broken = Broken(target.args)
    observer = Observer()
    with pipeline_of("none", observer, target=broken) as pipeline:
        with pytest.raises(GenerationError, match="failed on the prompt: RuntimeError: no memory"):
            pipeline.generate(PROMPT, max_tokens=3)
        with pytest.raises(GenerationError, match="no memory"):
            pipeline.generate(PROMPT[:1], max_tokens=3)
    assert len(observer.all("failed")) == 2


# --- policies, nodes and plugins -------------------------------------------------------------


class BadPolicy:
    """An acceptance policy that goes wrong once the text has begun."""

    info = ComponentInfo("bad-policy")

    def __init__(self, accepted: int, following: int) -> None:
        self._answer = accepted, following

    def accept(self, draft: Draft, logits: mx.array, sampling: Any) -> Any:
        accepted, following = self._answer if draft.width else (0, 3)
        return mx.array([accepted]), mx.array([following])


@pytest.mark.parametrize(("accepted", "following"), [(5, 1), (-1, 1), (2, VOCAB), (2, -1)])
def test_an_acceptance_policy_out_of_range(accepted: int, following: int) -> None:
    observer = Observer()
    policy = BadPolicy(accepted, following)
    with pipeline_of(
        half_right(answer(), 2),
        observer,
        Offer(acceptance={"bad-policy": policy}),
        configure=lambda b: b.acceptance("bad-policy"),
    ) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        assert next(stream).token_ids == (3,)
        with pytest.raises(GenerationError) as caught:
            next(stream)
    message = str(caught.value)
    assert "acceptance policy 'bad-policy'" in message
    assert f"num_accepted {accepted} of 4 and next token {following}" in message
    assert same_caches(stream.cache, fresh_cache(model(), PROMPT))
    assert len(observer.all("failed")) == 1


class FailsAt:
    """A node that raises from its n-th call on."""

    info = ComponentInfo("fails-at")

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self, *inputs: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise LookupError("no such row")


PLACES = ["width", "draft", "speculate", "verify", "accept", "read", "rollback", "observe"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["attention", "hybrid"])
def test_a_failing_node_loses_nothing_wherever_it_is(place: str, family: str) -> None:
    observer, handed = Observer(), []
    with pipeline_of(
        half_right(answer(family), 2),
        observer,
        Offer(node={"fails-at": FailsAt(2)}),
        target=model(family),
        configure=lambda b: b.insert("fails-at", after=place),
    ) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        with pytest.raises(GenerationError, match="LookupError: no such row"):
            hand_out(stream, handed)
    assert tuple(handed) == answer(family)[: len(handed)]
    assert len(handed) in (4, 7), "two cycles of three, or one where the prompt's counts"
    held = (*PROMPT, *handed)[:-1]
    assert same_caches(stream.cache, fresh_cache(model(family), held))
    (failure,) = observer.all("failed")
    assert failure.generated_tokens == len(handed)


@pytest.mark.parametrize("place", PLACES[2:])
@pytest.mark.parametrize("family", ["attention", "hybrid"])
def test_a_node_that_fails_once_has_its_cycle_tried_again(place: str, family: str) -> None:
    class FailsOnce(FailsAt):
        def __call__(self, *inputs: Any) -> None:
            if self._left == 0:
                self._left = -1
                raise LookupError("only now")
            self._left -= 1

    tokens: list[int] = []
    with pipeline_of(
        half_right(answer(family), 2),
        Offer(node={"fails-at": FailsOnce(2)}),
        target=model(family),
        configure=lambda b: b.insert("fails-at", after=place),
    ) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        with pytest.warns(DrafterFallbackWarning, match="only now"):
            hand_out(stream, tokens)
    assert tuple(tokens) == answer(family)
    assert same_caches(stream.cache, fresh_cache(model(family), (*PROMPT, *tokens)[:-1]))


class BadWidth:
    """A width policy that fails at its n-th call of one method."""

    info = ComponentInfo("bad-width")

    def __init__(self, method: str) -> None:
        self._method, self._left = method, 2

    def _now(self, method: str) -> None:
        if method == self._method:
            self._left -= 1
            if self._left < 0:
                raise ZeroDivisionError("no cycles yet")

    def choose(self, limit: int) -> Width:
        self._now("choose")
        return Width(4, 4)

    def observe(self, drafted: int, verified: int, accepted: int, seconds: float) -> None:
        self._now("observe")


@pytest.mark.parametrize("method", ["choose", "observe"])
def test_a_failing_width_policy_loses_nothing(method: str) -> None:
    observer, handed = Observer(), []
    with pipeline_of(
        half_right(answer(), 2),
        observer,
        Offer(width={"bad-width": BadWidth(method)}),
        configure=lambda b: b.width("bad-width"),
    ) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        with pytest.raises(GenerationError, match="ZeroDivisionError"):
            hand_out(stream, handed)
    assert tuple(handed) == answer()[: len(handed)]
    assert same_caches(stream.cache, fresh_cache(model(), (*PROMPT, *handed)[:-1]))
    assert len(observer.all("failed")) == 1
    assert stream.stats.generated_tokens == len(handed) > 1


def test_a_failing_observer_loses_nothing() -> None:
    class Fails:
        @hookimpl
        def cycle_finished(self, event: Any) -> None:
            raise OSError("disk full")

    handed: list[int] = []
    with pipeline_of(half_right(answer(), 2), Fails()) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        with pytest.raises(GenerationError, match="OSError: disk full"):
            hand_out(stream, handed)
    assert tuple(handed) == answer()[:4]
    assert same_caches(stream.cache, fresh_cache(model(), (*PROMPT, *handed)[:-1]))


def test_a_node_may_not_leave_its_port_empty() -> None:
    class Forgets:
        info = ComponentInfo(
            "forgets", inputs=(Port("logits"),), outputs=(Port("logits"), Port("extra"))
        )

        def __call__(self, logits: mx.array) -> Any:
            return (logits,)

    with (
        pipeline_of(
            "none",
            Offer(node={"forgets": Forgets()}),
            configure=lambda b: b.insert("forgets", after="verify"),
        ) as pipeline,
        pytest.raises(GenerationError, match="ValueError"),
    ):
        pipeline.generate(PROMPT, max_tokens=3)
