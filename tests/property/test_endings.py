"""Where a text ends inside a block, or a cycle fails: the caches hold what was emitted, no more.

All but the last emitted token, to be exact: that one is the anchor of whatever follows.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloom.contracts import ComponentInfo, TargetAdapter, TargetOutput
from draftloom.engine import Engine
from draftloom.errors import DrafterFallbackWarning, GenerationError
from draftloom.pipeline import GenerateOptions, Pipeline
from draftloom.verifiers.block import BlockVerifier
from tests.support import cases
from tests.support.cases import Case
from tests.support.oracle import Trace
from tests.support.profile import examples

FAMILIES = ("qwen3_5-v2", "qwen3_5_moe", "qwen3_next", "qwen3", "llama-tied")
PROMPT = (3, 1, 4, 1, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def case(family: str, rollback: str = "auto", verifier: str = "block", mode: str = "right") -> Case:
    return Case(family, f"scripted-{mode}", rollback, verifier, 8, PROMPT)


def emit(engine: Engine) -> list[int]:
    return [token for event in engine.cycles() for token in event.token_ids]


def check_goes_on(pipeline: Pipeline, engine: Engine, trace: Trace, count: int) -> None:
    """A new generation on the old caches, begun with the last token, writes the same text on."""
    drafter: Any = pipeline._parts.drafter
    drafter.start = count - 1
    options = GenerateOptions(max_tokens=5, cache=engine.cache)
    going_on = pipeline.engine((trace.tokens[count - 1],), options)
    assert tuple(emit(going_on)) == trace.tokens[count : count + 5]
    assert not going_on.stats.fell_back


@pytest.mark.parametrize("verifier", cases.VERIFIERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_sequence_cuts_inside_a_block(family: str, verifier: str, folder: Path) -> None:
    @examples(6, family, verifier)
    @given(st.sampled_from(cases.rollbacks_for(family)), st.integers(0, 17))
    def check(rollback: str, at: int) -> None:
        this = case(family, rollback, verifier)
        trace, start = this.trace, len(PROMPT)
        new = trace.tokens[start:]
        end = new.index(new[at]) + 1
        tokenizer = SimpleNamespace(eos_token_ids={new[at]})
        with cases.build(this, folder, tokenizer).build() as pipeline:
            engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=30))
            events = list(engine.cycles())
            assert tuple(t for e in events for t in e.token_ids) == new[:end]
            assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + ["stop"]
            assert not trace.differences(engine.cache, start + end - 1)
            assert engine.stats.generated_tokens == end
            unwrapped = SimpleNamespace(eos_token_ids=set())
            pipeline.tokenizer = unwrapped
            check_goes_on(pipeline, engine, trace, start + end)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_max_tokens_cuts_inside_a_block(family: str, folder: Path) -> None:
    @examples(6, family)
    @given(
        st.sampled_from(cases.rollbacks_for(family)),
        st.sampled_from(["right", "mixed", "half"]),
        st.integers(1, 20),
    )
    def check(rollback: str, mode: str, max_tokens: int) -> None:
        this = case(family, rollback, mode=mode)
        trace, start = this.trace, len(PROMPT)
        with cases.build(this, folder).build() as pipeline:
            engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=max_tokens))
            events = list(engine.cycles())
            emitted = tuple(t for e in events for t in e.token_ids)
            assert emitted == trace.tokens[start : start + max_tokens]
            assert events[-1].finish_reason == "length"
            assert not trace.differences(engine.cache, start + max_tokens - 1)
            check_goes_on(pipeline, engine, trace, start + max_tokens)

    check()


def test_ends_fall_in_the_middle_of_blocks(folder: Path) -> None:
    """That the two tests above cut blocks at all."""
    this = case("qwen3_5-v2")
    with cases.build(this, folder).build() as pipeline:
        events = list(pipeline.engine(PROMPT, GenerateOptions(max_tokens=18)).cycles())
    assert [len(e.token_ids) for e in events] == [1, 8, 8, 1]


@pytest.mark.parametrize("rollback", list(cases.ROLLBACKS))
@pytest.mark.parametrize("kept", range(9))
def test_cut_takes_back_the_end_of_the_last_block(kept: int, rollback: str, folder: Path) -> None:
    """What a stop string does: some of the tokens of the last cycle were never emitted."""
    this = case("qwen3_5-v2", rollback)
    trace = this.trace
    with cases.build(this, folder).build() as pipeline:
        engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=30))
        running = engine.cycles()
        next(running), next(running)
        before = len(PROMPT) + 1
        assert engine.stats.generated_tokens == 9
        engine.cut(kept)
        # Nothing kept: the cycle never was, and the anchor is out of the caches again.
        assert not trace.differences(engine.cache, before + kept - 1)
        assert engine.stats.generated_tokens == 1 + kept
        engine.cut(kept // 2)
        assert not trace.differences(engine.cache, before + kept // 2 - 1)


@pytest.mark.parametrize("rollback", list(cases.ROLLBACKS))
@pytest.mark.parametrize("after", [0, 1, 9])
def test_cancelling_leaves_what_was_emitted(after: int, rollback: str, folder: Path) -> None:
    this = attrs.evolve(case("qwen3_5-v2", rollback), prompt=PROMPT[: 5 if after else 1])
    trace, emitted = this.trace, []
    with cases.build(this, folder).build() as pipeline:
        options = GenerateOptions(max_tokens=30, cancelled=lambda: len(emitted) >= after)
        engine = pipeline.engine(this.prompt, options)
        for event in engine.cycles():
            emitted.extend(event.token_ids)
        assert event.finish_reason == "cancelled"
        assert len(emitted) == after
        count = len(this.prompt) + after
        assert not trace.differences(engine.cache, count - 1)
        check_goes_on(pipeline, engine, trace, count)


def test_closing_a_stream_leaves_what_was_handed_out(folder: Path) -> None:
    this = case("qwen3_5-v2")
    with cases.build(this, folder).build() as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=30)
        handed = [t for _ in range(2) for t in next(stream).token_ids]
        stream.close()
        count = len(PROMPT) + len(handed)
        assert not this.trace.differences(stream.cache, count - 1)
        assert list(stream) == []


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cycle_that_fails_once_costs_the_draft_and_no_token(family: str, folder: Path) -> None:
    for rollback in cases.rollbacks_for(family):
        this = case(family, rollback)
        trace, count = this.trace, len(PROMPT)
        builder = cases.build(this, folder).verifier("test.failing", at=2)
        with builder.build() as pipeline:
            engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=14))
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                for event in engine.cycles():
                    count += len(event.token_ids)
                    assert not trace.differences(engine.cache, count - 1)
            assert count == len(PROMPT) + 14
            assert [w.category for w in said] == [DrafterFallbackWarning]
            assert "the device is gone" in str(said[0].message)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_target_that_fails_leaves_the_caches_as_before(
    family: str, at: int, folder: Path
) -> None:
    for rollback in cases.rollbacks_for(family):
        this = case(family, rollback)
        emitted: list[int] = []
        builder = cases.build(this, folder).verifier("test.failing", at=at, always=True)
        with builder.build() as pipeline:
            engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=30))
            with pytest.raises(GenerationError, match="the device is gone"):
                emitted.extend(t for event in engine.cycles() for t in event.token_ids)
            assert len(emitted) == (0, 1, 9)[at]
            count = len(PROMPT) + len(emitted)
            assert not this.trace.differences(engine.cache, count - 1)


def test_an_error_carries_the_tokens_so_far(folder: Path) -> None:
    this = case("qwen3_5-v2")
    builder = cases.build(this, folder).verifier("test.failing", at=2, always=True)
    with builder.build() as pipeline, pytest.raises(GenerationError) as caught:
        emit(pipeline.engine(PROMPT, GenerateOptions(max_tokens=30)))
    assert caught.value.token_ids == this.trace.tokens[len(PROMPT) : len(PROMPT) + 9]


def test_an_interrupt_inside_a_cycle_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(BlockVerifier):
        info = ComponentInfo("interrupted")

        def verify(self, target: TargetAdapter, block: mx.array, speculation: Any) -> TargetOutput:
            output = super().verify(target, block, speculation)
            if block.shape[1] > 1:
                raise KeyboardInterrupt
            return output

    for rollback in cases.ROLLBACKS:
        this = case("qwen3_5-v2", rollback)
        with cases.build(this, folder).build() as pipeline:
            engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=30))
            verifier = pipeline._parts.verifier
            monkeypatch.setattr(verifier, "verify", Interrupted().verify, raising=True)
            with pytest.raises(KeyboardInterrupt):
                emit(engine)
            assert not this.trace.differences(engine.cache, len(PROMPT))


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3"])
def test_texts_of_the_case_are_not_given_up_silently(family: str, folder: Path) -> None:
    """No warning in a generation that goes well (the tests above would not see one)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with cases.build(case(family), folder).build() as pipeline:
            emitted = pipeline.generate(PROMPT, max_tokens=18)
    assert emitted.stats.acceptance_rate == 1.0
