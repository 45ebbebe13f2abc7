"""Plain cycles in flight: the same text, and caches that hold what was handed out.

Counts are of passes through the target: one a token, and one more where the text ended while the
next was in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloom import ComponentInfo, GenerationError, Pipeline, Port, Width

from .fakes import (
    PROMPT,
    Offer,
    OneTokenEach,
    Scripted,
    fresh_cache,
    half_right,
    model,
    pipeline_of,
    plain,
    quick,
    same_caches,
)

COUNT = 16
ROLLBACKS = ("auto", "snapshot")


@pytest.fixture(params=("attention", "hybrid"))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def answer(family: str = "attention") -> tuple[int, ...]:
    return plain(model(family), PROMPT, COUNT)


class Counting:
    """The block verifier, counting its passes; the n-th can be made to fail."""

    info = ComponentInfo("counting")

    def __init__(self, fails: tuple[int, ...] = ()) -> None:
        self.passes = 0
        self._fails = fails

    def verify(self, target: Any, block: mx.array, speculation: Any) -> Any:
        self.passes += 1
        output = target.forward(block, speculation.cache)
        if self.passes in self._fails:
            raise OSError("the device is gone")
        return output


class Widths:
    """Drafts as a list says, cycle by cycle."""

    info = ComponentInfo("listed")

    def __init__(self, widths: Any) -> None:
        self._widths: Iterator[int] = iter(widths)

    def choose(self, limit: int) -> Width:
        width = min(limit, next(self._widths, 0))
        return Width(width, width)

    def observe(self, *args: Any) -> None:
        """Nothing to learn."""


def counted(
    family: str = "attention",
    drafter: Any = "none",
    *extra: Any,
    fails: tuple[int, ...] = (),
    widths: Any = None,
    rollback: str = "auto",
    tokenizer: Any = None,
) -> tuple[Pipeline, Counting]:
    verifier = Counting(fails)
    parts: dict[str, Any] = {"verifier": {"counting": verifier}}
    if widths is not None:
        parts["width"] = {"listed": Widths(widths)}

    def configure(builder: Any) -> Any:
        builder = builder.verifier("counting").rollback(rollback)
        return builder if widths is None else builder.width("listed")

    pipeline = pipeline_of(
        drafter,
        Offer("parts", **parts),
        *extra,
        target=model(family),
        tokenizer=tokenizer,
        configure=configure,
    )
    return pipeline, verifier


def holds(stream: Any, family: str, emitted: Any) -> bool:
    """Whether the caches hold the prompt and the text but its last token."""
    expected = fresh_cache(model(family), (*PROMPT, *emitted)[:-1])
    return same_caches(stream.cache, expected)


@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_the_limit_is_known_so_that_no_pass_is_in_vain(family: str, rollback: str) -> None:
    pipeline, verifier = counted(family, rollback=rollback)
    with pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        emitted = tuple(t for chunk in stream for t in chunk.token_ids)
        assert emitted == answer(family)
        assert verifier.passes == COUNT
        assert holds(stream, family, emitted)


@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_the_pass_after_the_end_of_the_text_is_taken_back(family: str, rollback: str) -> None:
    text = answer(family)
    end = next(i for i in range(3, COUNT) if text[i] not in text[:i])
    pipeline, verifier = counted(family, rollback=rollback, tokenizer=OneTokenEach([text[end]]))
    with pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        emitted = tuple(t for chunk in stream for t in chunk.token_ids)
        assert emitted == text[: end + 1]
        assert verifier.passes == len(emitted) + 1
        assert holds(stream, family, emitted)
        # What is appended now goes on where the text ended.
        again = pipeline.generate(
            emitted[-1:], max_tokens=3, cache=stream.cache, ignore_eos=True
        ).token_ids
    assert again == plain(model(family), (*PROMPT, *emitted), 3)


def test_a_stop_string_takes_it_back(family: str) -> None:
    text = answer(family)
    stop = OneTokenEach.decode(text[4:6])
    pipeline, _ = counted(family, tokenizer=OneTokenEach())
    with pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT, stop=[stop])
        emitted = tuple(t for chunk in stream for t in chunk.token_ids)
        assert emitted == text[: len(emitted)]
        assert len(emitted) <= 6
        assert holds(stream, family, emitted)


@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_caches_read_on_the_way_hold_what_was_handed_out(family: str, rollback: str) -> None:
    pipeline, verifier = counted(family, rollback=rollback)
    with pipeline:
        stream, emitted = pipeline.stream(PROMPT, max_tokens=COUNT), []
        for chunk in stream:
            emitted += chunk.token_ids
            if len(emitted) % 3 == 0:
                assert holds(stream, family, emitted)
    assert tuple(emitted) == answer(family)
    assert verifier.passes == COUNT + len(range(3, COUNT, 3))


def test_a_closed_stream_leaves_nothing_in_flight(family: str) -> None:
    pipeline, verifier = counted(family)
    with pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        emitted = [next(stream).token_ids[0] for _ in range(5)]
        stream.close()
        assert verifier.passes == 6
        assert holds(stream, family, emitted)


@pytest.mark.parametrize("times", range(5))
@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_cancelling_takes_both_back(family: str, rollback: str, times: int) -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > times

    pipeline, _ = counted(family, rollback=rollback)
    with pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT, cancelled=cancelled)
        emitted = tuple(t for chunk in stream for t in chunk.token_ids)
        assert emitted == answer(family)[: max(times - 1, 0)]
        if emitted:
            assert holds(stream, family, emitted)


@pytest.mark.parametrize("options", [{"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9}])
def test_draws_taken_back_are_drawn_again(options: dict[str, Any]) -> None:
    def text(look: bool) -> list[int]:
        with pipeline_of() as pipeline:
            stream, tokens = pipeline.stream(PROMPT, max_tokens=COUNT, seed=7, **options), []
            for chunk in stream:
                tokens += chunk.token_ids
                if look:
                    assert stream.cache
        return tokens

    assert text(look=True) == text(look=False)


@quick
@given(
    widths=st.lists(st.sampled_from((0, 0, 1, 3)), min_size=COUNT, max_size=COUNT),
    right=st.integers(0, 3),
)
@pytest.mark.parametrize("which", ["attention", "hybrid"])
def test_plain_and_speculative_cycles_in_any_order(
    which: str, widths: list[int], right: int
) -> None:
    pipeline, _ = counted(which, half_right(answer(which), right), widths=widths)
    with pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        emitted = tuple(t for chunk in stream for t in chunk.token_ids)
        assert emitted == answer(which)
        assert holds(stream, which, emitted)


def test_a_drafter_learns_every_token_that_passed_by(family: str) -> None:
    drafter = half_right(answer(family), 2)
    pipeline, _ = counted(family, drafter, widths=[0, 0, 0, 0, 3, 0, 0, 0, 2])
    with pipeline:
        assert pipeline.generate(PROMPT, max_tokens=COUNT).token_ids == answer(family)
    seen = [t for tokens in drafter.observed for t in tokens]
    whole = [*PROMPT, *answer(family)]
    assert seen == whole[: len(seen)]
    assert len(seen) > COUNT


def test_a_width_policy_is_asked_once_a_cycle() -> None:
    asked: list[int] = []

    class Asked(Widths):
        def choose(self, limit: int) -> Width:
            asked.append(1)
            return super().choose(limit)

    extra = Offer("asked", width={"asked": Asked([0, 0, 3, 0, 0, 3, 3, 0])})
    drafter = half_right(answer(), 1)
    with pipeline_of(drafter, extra, configure=lambda b: b.width("asked")) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=COUNT)
    assert result.token_ids == answer()
    assert len(asked) == result.stats.cycles


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_pass_that_fails_is_run_again_in_its_turn(family: str, at: int) -> None:
    pipeline, verifier = counted(family, fails=(at,) if at > 1 else (2,))
    with pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        emitted = tuple(t for chunk in stream for t in chunk.token_ids)
        assert emitted == answer(family)
        assert verifier.passes == COUNT + 1, "the one that failed, and no further attempts ahead"
        assert holds(stream, family, emitted)


def test_a_pass_that_goes_on_failing_loses_no_token(family: str) -> None:
    pipeline, _ = counted(family, fails=(5, 6))
    emitted: list[int] = []
    with pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        with pytest.raises(GenerationError, match="the device is gone") as caught:
            emitted.extend(t for chunk in stream for t in chunk.token_ids)
        assert tuple(emitted) == answer(family)[:4] == caught.value.token_ids
        assert holds(stream, family, emitted)


class Probe:
    """An inserted node, which may want each cycle's values before the next is begun."""

    info = ComponentInfo("lab.probe", inputs=(Port("logits"),))

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, logits: mx.array) -> None:
        self.rows += logits.shape[1]


def test_with_an_inserted_node_cycles_run_one_by_one() -> None:
    probe = Probe()
    verifier = Counting()
    extra = Offer("lab", node={"lab.probe": probe}, verifier={"counting": verifier})
    with pipeline_of(
        "none",
        extra,
        configure=lambda b: b.verifier("counting").insert("lab.probe", after="verify"),
    ) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        for cycle, _ in enumerate(stream, start=1):
            assert verifier.passes == cycle
    assert probe.rows == COUNT


def test_with_penalties_cycles_run_one_by_one() -> None:
    pipeline, verifier = counted()
    with pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT, repetition_penalty=1.3)
        for cycle, _ in enumerate(stream, start=1):
            assert verifier.passes == cycle


def test_a_drafter_that_failed_leaves_plain_cycles_in_flight() -> None:
    def script(known: list[int], width: int) -> list[int]:
        raise OSError("gone")

    pipeline, verifier = counted("attention", Scripted(script), widths=[3] * COUNT)
    with pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        with pytest.warns(UserWarning, match="going on with the target alone"):
            emitted = list(next(stream).token_ids)
        while len(emitted) < 5:
            emitted += next(stream).token_ids
        assert verifier.passes == 6
        emitted += [t for chunk in stream for t in chunk.token_ids]
    assert tuple(emitted) == answer()
