"""Blocks that are launched before the host knows what was kept of the one before: the same text,
the same caches, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloom import GenerationError, Width
from draftloom.composite import CompositeSpeculation
from draftloom.contracts import ComponentInfo
from draftloom.pipeline import GenerateOptions
from tests.support import models, pipelines
from tests.support.oracle import Trace, greedy_trace
from tests.support.profile import examples

AHEAD = {"compiled-pass": "ahead", "replay-verify": "on"}
FAMILIES = ("qwen3_5-v2", "qwen3_5-experts", "qwen3_next", "qwen3", "llama-tied")
PROMPT = tuple(i * 7 % models.VOCAB for i in range(1, 9))
COUNT = 40
TAPS = (0, 2)


@attrs.define
class Counts:
    """What speculations were asked to do: go on ahead, and to settle."""

    ahead: int = 0
    settled: int = 0


@contextmanager
def counted() -> Iterator[Counts]:
    counts = Counts()
    with pytest.MonkeyPatch.context() as patch:
        commit, settle = CompositeSpeculation.commit_ahead, CompositeSpeculation.settle

        def commits(self: Any, kept: mx.array) -> None:
            counts.ahead += 1
            commit(self, kept)

        def settles(self: Any, dropped: int) -> None:
            counts.settled += 1
            settle(self, dropped)

        patch.setattr(CompositeSpeculation, "commit_ahead", commits)
        patch.setattr(CompositeSpeculation, "settle", settles)
        yield counts


def text_of(family: str, prompt: tuple[int, ...] = PROMPT) -> Trace:
    return greedy_trace(family, prompt, COUNT + 24)


def builder_of(family: str, prompt: tuple[int, ...] = PROMPT, **options: Any) -> Any:
    text = text_of(family, prompt).tokens
    builder = pipelines.builder(models.build(family)).kernels(AHEAD)
    return builder.drafter(
        "test.ahead", text=text, vocab_size=models.VOCAB, taps=TAPS, **options
    ).block_size(5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_caches_and_features(family: str) -> None:
    """Every n-th draft token is wrong. The caches are looked at in drawn cycles, which takes back
    the cycle in flight, and at the end."""
    ahead = settled = 0

    @examples(12, family)
    @given(
        st.lists(st.integers(0, models.VOCAB - 1), min_size=1, max_size=12),
        st.integers(0, 7),
        st.integers(2, 9),
        st.sets(st.integers(0, 12), max_size=3),
    )
    def check(prompt: list[int], every: int, size: int, looks: set[int]) -> None:
        nonlocal ahead, settled
        trace, count = text_of(family, tuple(prompt)), len(prompt)
        builder = builder_of(family, tuple(prompt), every=every).block_size(size)
        with builder.build() as pipeline, counted() as counts:
            engine = pipeline.engine(tuple(prompt), GenerateOptions(max_tokens=COUNT))
            for event in engine.cycles():
                assert event.token_ids == trace.tokens[count : count + len(event.token_ids)]
                count += len(event.token_ids)
                if event.index in looks:
                    assert not trace.differences(engine.cache, count - 1)
            assert count == len(prompt) + COUNT
            assert not trace.differences(engine.cache, count - 1)
            assert not engine.stats.fell_back
            drafter: Any = pipeline._parts.drafter
            shown = np.concatenate([np.array(f)[0] for f in drafter.features])
            assert drafter.seen == list(trace.tokens[: len(drafter.seen)])
            assert np.array_equal(shown, trace.taps(TAPS, len(drafter.seen)))
        ahead, settled = ahead + counts.ahead, settled + counts.settled

    check()
    assert ahead >= settled > 20


def test_a_hybrid_is_traced_no_more_than_otherwise() -> None:
    family, found = "qwen3_5-v2", []
    for choice in ("on", "ahead"):
        builder = builder_of(family, every=4).kernels({**AHEAD, "compiled-pass": choice})
        with builder.build() as pipeline:
            for _ in range(2):
                pipeline.generate(PROMPT, max_tokens=COUNT)
            found.append(pipeline._parts.target.compiled.traced)
    assert found[1] <= found[0] + 1


class Ends:
    """A tokenizer that knows where texts end."""

    def __init__(self, token: int) -> None:
        self.eos_token_ids = {token}


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3"])
@pytest.mark.parametrize("every", [0, 3])
def test_a_text_that_ends_inside_a_block(family: str, every: int) -> None:
    trace = text_of(family)
    for end in sorted({*trace.tokens[len(PROMPT) :]}):
        expected = trace.tokens[len(PROMPT) :]
        expected = expected[: expected.index(end) + 1][:COUNT]
        builder = pipelines.builder(models.build(family), Ends(end)).kernels(AHEAD)
        builder = builder.drafter(
            "test.ahead", text=trace.tokens, vocab_size=models.VOCAB, taps=TAPS, every=every
        ).block_size(6)
        with builder.build() as pipeline:
            engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=COUNT))
            found = [token for event in engine.cycles() for token in event.token_ids]
            assert tuple(found) == expected
            assert not trace.differences(engine.cache, len(PROMPT) + len(found) - 1)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_text_cut_inside_its_last_block(kept: int) -> None:
    family = "qwen3_5-v2"
    trace, count = text_of(family), len(PROMPT)
    with builder_of(family).build() as pipeline, counted() as counts:
        engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=COUNT))
        for event in engine.cycles():
            count += len(event.token_ids)
            if event.index == 3:
                assert len(event.token_ids) == 5
                engine.cut(kept)
                break
        count -= 5 - kept
        assert counts.settled == 3
        assert not trace.differences(engine.cache, count - 1)


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3"])
@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.filterwarnings("ignore::draftloom.DrafterFallbackWarning")
def test_a_pass_that_fails_loses_no_token(family: str, at: int) -> None:
    """The verifier fails in one pass: the drafter is given up, or the pass was ahead and is run
    again in its turn. Where the target fails for good, what was committed is handed out."""
    trace = text_of(family)
    for always in (False, True):
        builder = builder_of(family, every=5).verifier("test.failing", at=at, always=always)
        with builder.build() as pipeline:
            engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=COUNT))
            found: list[int] = []
            expected = pytest.raises(GenerationError) if always else nullcontext()
            with expected as caught:
                for event in engine.cycles():
                    found += event.token_ids
            if caught is not None:
                assert caught.value.token_ids == tuple(found)
            assert tuple(found) == trace.tokens[len(PROMPT) :][: len(found)]
            assert always or len(found) == COUNT
            assert not trace.differences(engine.cache, len(PROMPT) + len(found) - 1)


@pytest.mark.parametrize("sick", [(0,), (1,), (2, 3), (5,)])
def test_a_draft_that_is_not_healthy(sick: tuple[int, ...]) -> None:
    """Its block was launched before anybody could know."""
    family = "qwen3_5-v2"
    trace = text_of(family)
    with builder_of(family, every=6, sick=sick).build() as pipeline:
        engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=COUNT))
        with pytest.warns(UserWarning, match="not finite"):
            found = [token for event in engine.cycles() for token in event.token_ids]
        assert tuple(found) == trace.tokens[len(PROMPT) :][:COUNT]
        assert not trace.differences(engine.cache, len(PROMPT) + COUNT - 1)


@pytest.mark.parametrize("after", range(1, 7))
def test_a_text_that_is_cancelled(after: int) -> None:
    family, polled = "qwen3_5-v2", 0
    trace = text_of(family)

    def cancelled() -> bool:
        nonlocal polled
        polled += 1
        return polled > after

    with builder_of(family, every=4).build() as pipeline:
        options = GenerateOptions(max_tokens=COUNT, cancelled=cancelled)
        engine = pipeline.engine(PROMPT, options)
        events = list(engine.cycles())
        found = [token for event in events for token in event.token_ids]
        assert events[-1].finish_reason == "cancelled"
        assert tuple(found) == trace.tokens[len(PROMPT) :][: len(found)]
        assert not trace.differences(engine.cache, len(PROMPT) + len(found) - 1)


class Listed:
    """Widths from a list."""

    info = ComponentInfo("listed")

    def __init__(self, widths: list[int]) -> None:
        self._widths = iter(widths)

    def choose(self, limit: int) -> Width:
        width = next(self._widths, 4)
        return Width(width, width)

    def observe(self, *args: Any) -> None:
        """Nothing to learn."""


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3"])
def test_blocks_and_plain_cycles_in_turn(family: str, tmp_path: Path) -> None:
    trace = text_of(family)
    with builder_of(family, every=4).build() as pipeline:
        parts = pipeline._parts
        for widths in ([4, 4, 0, 0, 4, 4, 4, 0], [0, 0, 3, 0, 2, 5, 5], [3, 2, 5, 1, 4, 4, 2]):
            parts = attrs.evolve(parts, width=Listed(widths))
            pipeline._parts = parts
            engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=COUNT))
            found = [token for event in engine.cycles() for token in event.token_ids]
            assert tuple(found) == trace.tokens[len(PROMPT) :][:COUNT]
            assert not trace.differences(engine.cache, len(PROMPT) + COUNT - 1)


@pytest.mark.parametrize(
    "change",
    [
        {"rollback": "snapshot"},
        {"kernels": {**AHEAD, "replay-verify": "off"}},
        {"kernels": {**AHEAD, "compiled-pass": "on"}},
    ],
    ids=["snapshot", "no deferral", "on"],
)
def test_where_something_cannot_go_ahead_nothing_does(change: dict[str, Any]) -> None:
    family = "qwen3_5-v2"
    trace, builder = text_of(family), builder_of(family, every=4)
    for name, value in change.items():
        builder = getattr(builder, name)(value)
    with builder.build() as pipeline, counted() as counts:
        found = pipeline.generate(PROMPT, max_tokens=COUNT)
    assert found.token_ids == trace.tokens[len(PROMPT) :][:COUNT]
    assert counts.ahead == 0


def test_a_random_drafter_of_real_layers(tmp_path: Path) -> None:
    """Its context is written ahead as well."""
    family = "qwen3_5-v2"
    folder = pipelines.dflash_checkpoint(
        tmp_path, hidden=models.HIDDEN, vocab=models.VOCAB, taps=TAPS
    )
    trace = text_of(family)
    builder = pipelines.builder(models.build(family)).drafter("dflash", checkpoint=str(folder))
    builder = builder.kernels({**AHEAD, "compiled-draft": "ahead"}).block_size(5)
    with builder.build() as pipeline, counted() as counts:
        found = pipeline.generate(PROMPT, max_tokens=COUNT)
    assert found.token_ids == trace.tokens[len(PROMPT) :][:COUNT]
    assert counts.settled > 10


def test_nobody_but_a_traced_pass_can_go_on_ahead() -> None:
    from mlx_lm.models.cache import KVCache

    from draftloom.kv_view import KVCacheBehind

    rows = mx.zeros((1, 1, 2, 4))
    with pytest.raises(RuntimeError, match="only a traced pass"):
        KVCacheBehind(KVCache(), mx.array([1])).update_and_fetch(rows, rows)
