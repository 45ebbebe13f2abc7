"""The memory guard: tiny limits, real models. Numbers are in every message, and texts stay."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import draftloom
from draftloom import GenerationError, MemoryGuardWarning, MemoryLimitError
from draftloom.guard import Costs, MemoryGuard, check_weights
from draftloom.memory import CacheCost, WorkShape
from draftloom.pipeline import GenerateOptions
from tests.parity.test_quantized_targets import write as write_quantized
from tests.support import kv, models, pipelines

PROMPT = tuple(i % models.VOCAB for i in range(300))
MB = 10**6


@pytest.fixture(autouse=True)
def _no_garbage() -> Iterator[None]:
    """Memory in use is compared: nothing of an earlier test may go in the middle of one."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What the guard says on the way is not looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MemoryGuardWarning)
        yield


def costs(context: int = 0) -> Costs:
    """1 kB a token of cache, 10 kB to work on a token."""
    work = WorkShape(0, 0, 1, 1, 5000, whole_scores=False)
    return Costs((CacheCost(0, 1000.0),), work, lambda tokens: context * tokens)


def guard(spare: int, step: int = 2048, context: int = 0) -> MemoryGuard:
    """A guard that leaves so many bytes besides those in use."""
    mx.clear_cache()
    return MemoryGuard(mx.get_active_memory() + spare, costs(context), step)


# --- before weights ---------------------------------------------------------------------------


def test_weights_that_fit() -> None:
    limit = mx.get_active_memory() + 10 * MB
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_weights(5 * MB, 3 * MB, 1 * MB, limit)


def test_a_drafter_that_does_not_fit_stays_away() -> None:
    limit = mx.get_active_memory() + 7 * MB
    with pytest.warns(MemoryGuardWarning, match=r"no drafter: it needs 3\.0 MB"):
        assert not check_weights(5 * MB, 3 * MB, 1 * MB, limit)


def test_a_target_that_does_not_fit_is_refused_with_numbers() -> None:
    limit = mx.get_active_memory() + 5 * MB
    with pytest.raises(MemoryLimitError, match=r"5\.0 MB of weights and 1\.0 MB of caches"):
        check_weights(5 * MB, 3 * MB, 1 * MB, limit)


def test_build_looks_before_it_loads(tmp_path: Path) -> None:
    """Nothing is loaded: the memory in use stays as it is."""
    folder = write_quantized(tmp_path / "target", "qwen3", "4-bit")
    builder = draftloom.PipelineBuilder(folder, plugins=pipelines.plugins()).drafter("none")
    used = mx.get_active_memory() / 1e9
    with pytest.raises(MemoryLimitError) as caught:
        builder.memory(limit_gb=used + 1e-5).build()
    assert "of weights" in caught.value.message
    assert "--memory-limit" in caught.value.hint
    with pytest.raises(MemoryLimitError, match="of caches"):
        builder.memory(limit_gb=used + 1e-3, context_length=500_000).build()
    assert mx.get_active_memory() / 1e9 - used < 1e-5


def test_build_goes_on_without_a_drafter(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "target", "qwen3", "4-bit")
    checkpoint = pipelines.dflash_checkpoint(
        tmp_path / "dflash", hidden=64, vocab=models.VOCAB, taps=(0, 2), intermediate_size=4096
    )
    builder = draftloom.PipelineBuilder(folder, plugins=pipelines.plugins())
    builder = builder.drafter(str(checkpoint)).block_size(8)
    with builder.build() as pipeline:
        expected = pipeline.generate(PROMPT[:20], max_tokens=8).token_ids
        assert pipeline.names["drafter"] == "dflash"
    del pipeline
    gc.collect()
    limit = mx.get_active_memory() / 1e9 + 2e-3
    with pytest.warns(MemoryGuardWarning, match="no drafter"):
        alone = builder.memory(limit_gb=limit).build()
    with alone:
        assert alone.names["drafter"] == "none"
        assert alone.spec.width.use == "fixed"
        assert alone.generate(PROMPT[:20], max_tokens=8).token_ids == expected


# --- a generation, by numbers -----------------------------------------------------------------


def test_a_text_that_fits() -> None:
    watching = guard(100 * MB)
    assert watching.begin(0, 1000, 1200, drafter=True)
    assert watching.chunk(0, 999) == 999
    assert watching.shrunk == []


def test_a_text_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        guard(10 * MB).begin(0, 9000, 10_000, drafter=True)
    assert "a text of 10000 tokens needs 10.2 MB of caches" in caught.value.message
    assert "the limit is" in caught.value.message
    assert "--kv-bits" in caught.value.hint


def test_caches_that_are_there_already_are_not_counted_twice() -> None:
    assert guard(22 * MB).begin(8 * MB, 9000, 10_000, drafter=True)
    with pytest.raises(MemoryLimitError):
        guard(12 * MB).begin(0, 9000, 10_000, drafter=True)


def test_chunks_shrink_and_stay_small() -> None:
    watching = guard(12 * MB)
    with pytest.warns(MemoryGuardWarning, match=r"512 tokens at once instead of 2048 from token 0"):
        assert watching.chunk(0, 5000) == 512
    assert watching.chunk(512, 4488) == 512
    assert watching.step == 512
    assert len(watching.shrunk) == 1
    assert guard(5000).chunk(0, 5000) == 0


def test_a_context_that_does_not_fit() -> None:
    watching = guard(4 * MB, context=2000)
    with pytest.warns(MemoryGuardWarning, match=r"its context of 1200 tokens needs 2\.4 MB"):
        assert not watching.begin(0, 1000, 1200, drafter=True)
    assert guard(8 * MB, context=2000).begin(0, 1000, 1200, drafter=True)


def test_without_a_limit_nothing_is_watched() -> None:
    watching = MemoryGuard(None, costs(), 512)
    assert watching.begin(0, 10**9, 10**9, drafter=True)
    assert watching.chunk(0, 10**9) == 512
    assert watching.fits(10**9, 10**9, 64)


# --- a generation, by the engine --------------------------------------------------------------


def builder(family: str = "qwen3") -> Any:
    return pipelines.builder(kv.build(family)).drafter("prompt-lookup")


def limited(pipeline: Any, spare: int) -> Any:
    """The same pipeline with so many bytes to spare."""
    mx.clear_cache()
    limit = (mx.get_active_memory() + spare) / 1e9
    return builder().memory(limit_gb=limit)


def test_a_prompt_runs_in_smaller_chunks_to_the_same_text() -> None:
    with builder().build() as pipeline:
        expected = pipeline.generate(PROMPT, max_tokens=12)
        costs = pipeline._parts.costs()
        assert costs is not None
        work = costs.work.at(64, 320) + 2 * costs.caches_at(320)
    with (
        limited(pipeline, work).build() as small,
        pytest.warns(MemoryGuardWarning, match="the prompt runs"),
    ):
        result = small.generate(PROMPT, max_tokens=12)
    held = result.stats.memory
    assert result.token_ids == expected.token_ids
    assert held is not None
    assert 16 <= held.prefill_step_size <= 128
    assert held.shrunk
    assert result.as_dict()["memory"]["shrunk"] == list(held.shrunk)


def test_a_generation_that_does_not_fit_is_refused_before_it_runs() -> None:
    with builder().build() as pipeline:
        pass
    with (
        limited(pipeline, 20_000).build() as small,
        pytest.raises(MemoryLimitError, match="a text of 312 tokens needs"),
    ):
        small.generate(PROMPT, max_tokens=12)


def test_a_drafter_is_given_up_for_its_context() -> None:
    draft = pipelines.adapt(models.new(models.FAMILIES["qwen3"], 7))
    base = pipelines.builder(kv.build("qwen3")).drafter("autoregressive", model=draft)
    with base.build() as pipeline:
        expected = pipeline.generate(PROMPT, max_tokens=12)
        costs = pipeline._parts.costs()
        assert costs is not None
        needed = costs.caches_at(312) + costs.growing(312) + costs.work.at(16, 300)
        assert costs.context(312) > 50_000
    mx.clear_cache()
    limit = (mx.get_active_memory() + needed + 30_000) / 1e9
    with base.memory(limit_gb=limit).build() as small, pytest.warns(MemoryGuardWarning):
        result = small.generate(PROMPT, max_tokens=12)
    assert result.token_ids == expected.token_ids
    assert "no drafter" in result.stats.fell_back
    assert result.stats.drafted == 0
    assert expected.stats.drafted


def test_memory_that_runs_short_on_the_way() -> None:
    """Something else takes it while the prompt runs: the text so far stands."""
    with builder().build() as pipeline:
        pass
    taken: list[mx.array] = []
    with limited(pipeline, 60 * MB).build() as small:

        def take(done: int, total: int) -> None:
            if done == 128:
                taken.append(mx.ones((20 * MB,)))
                mx.eval(taken)

        engine = small.engine(
            PROMPT, GenerateOptions(max_tokens=4, prefill_chunk=128, on_prefill=take)
        )
        with quietly(), pytest.raises(GenerationError) as caught:
            list(engine.cycles())
    assert "the prompt does not fit" in caught.value.message
    assert "from token 128" in caught.value.message
    assert "--memory-limit" in caught.value.hint


def test_memory_that_runs_short_while_a_text_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    from draftloom import engine as engine_module

    monkeypatch.setattr(engine_module, "CLEAR_CACHE_TOKENS", 8)
    with builder().build() as pipeline:
        whole = pipeline.generate(PROMPT[:20], max_tokens=40).token_ids
    taken: list[mx.array] = []
    with limited(pipeline, 60 * MB).build() as small:

        def take(event: Any) -> None:
            if event.index == 3:
                taken.append(mx.ones((20 * MB,)))
                mx.eval(taken)

        with quietly(), pytest.raises(GenerationError) as caught:
            small.generate(PROMPT[:20], max_tokens=40, on_cycle=take)
    assert "the text does not fit" in caught.value.message
    count = len(caught.value.token_ids)
    assert 8 <= count < 40
    assert caught.value.token_ids == whole[:count]
