"""Quantized key/value caches: the very tokens and caches of plain mlx-lm with the same settings,
whatever is drafted, before, at and after the moment of conversion."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloom.kv_cache import KVQuantization
from draftloom.pipeline import GenerateOptions
from tests.support import kv, models, pipelines
from tests.support.cases import KERNELS, ROLLBACKS, TAPS
from tests.support.drafters import MODES
from tests.support.profile import examples

NEW_TOKENS = 20


@attrs.frozen
class Case:
    """A generation over caches that are packed on the way."""

    family: str
    settings: KVQuantization
    prompt: tuple[int, ...]
    block_size: int
    chunk: int = 2048
    mode: str = "mixed"
    rollback: str = "auto"
    verifier: str = "block"
    seed: int = 0


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    prompt = draw(st.lists(st.integers(0, models.VOCAB - 1), min_size=1, max_size=24))
    family = draw(st.sampled_from(kv.FAMILIES))
    hybrid = any(family == f.name for f in models.HYBRID)
    return Case(
        family=family,
        settings=KVQuantization(
            draw(st.sampled_from((2, 3, 4, 6, 8))), 32, draw(st.integers(0, len(prompt) + 24))
        ),
        prompt=tuple(prompt),
        block_size=draw(st.integers(1, 16)),
        chunk=draw(st.sampled_from((1, 3, 7, 2048))),
        mode=draw(st.sampled_from(MODES)),
        rollback=draw(st.sampled_from(tuple(ROLLBACKS) if hybrid else ("auto", "snapshot"))),
        verifier=draw(st.sampled_from(("block", "sequential"))),
        seed=draw(st.integers(0, 99)),
    )


def run(case: Case) -> int:
    """Generate and compare; returns the cycles."""
    stock = kv.stock(case.family)
    text, _ = kv.plain(stock, case.prompt, NEW_TOKENS + 16, case.settings, chunk=case.chunk)
    expected, caches = kv.plain(stock, case.prompt, NEW_TOKENS, case.settings, chunk=case.chunk)
    builder = (
        pipelines.builder(kv.build(case.family))
        .drafter(
            "test.scripted",
            text=(*case.prompt, *text),
            vocab_size=models.VOCAB,
            mode=case.mode,
            seed=case.seed,
            taps=TAPS,
        )
        .rollback(ROLLBACKS[case.rollback])
        .kernels(KERNELS.get(case.rollback, {}))
        .verifier(case.verifier)
        .block_size(case.block_size)
        .kv_cache(**attrs.asdict(case.settings))
    )
    with builder.build() as pipeline:
        options = GenerateOptions(max_tokens=NEW_TOKENS, prefill_chunk=case.chunk)
        engine = pipeline.engine(case.prompt, options)
        tokens = [token for event in engine.cycles() for token in event.token_ids]
        assert tokens == expected, case
        assert not engine.stats.fell_back
        engine.absorb_last()
        different = kv.differences(engine.cache, caches)
    assert not different, f"{case}: {different}"
    return engine.stats.cycles


@given(case=drawn())
@examples(20, "kv")
def test_tokens_and_caches_are_those_of_mlx_lm(case: Case) -> None:
    run(case)


@pytest.mark.slow
@given(case=drawn())
@examples(100, "kv", "more")
def test_tokens_and_caches_are_those_of_mlx_lm_for_more_draws(case: Case) -> None:
    run(case)


@pytest.mark.parametrize("family", kv.FAMILIES)
@pytest.mark.parametrize("start", [0, 9, 14])
def test_every_family_over_the_conversion(family: str, start: int) -> None:
    """Drafts that are right: blocks are as long as they may be, and end before the conversion."""
    settings = KVQuantization(4, 32, start)
    cycles = run(Case(family, settings, (5, 3, 8, 1, 20, 7, 11, 2), 16, mode="right"))
    assert cycles <= 5


def test_quantized_caches_say_something_else() -> None:
    """That the tests above can fail: the packed caches change the text."""
    prompt, settings = (5, 3, 8, 1, 20, 7, 11, 2), KVQuantization(2, 32, 0)
    for family in ("qwen3", "qwen3_5-v2"):
        model = kv.stock(family)
        assert kv.plain(model, prompt, 16, settings)[0] != kv.plain(model, prompt, 16, None)[0]


def test_a_drafter_of_features_reads_those_of_packed_caches(tmp_path: Path) -> None:
    """DFlash over packed caches, and the autoregressive drafter beside them."""
    settings = KVQuantization(4, 32, 12)
    prompt = (5, 3, 8, 1, 20, 7, 11, 2)
    checkpoint = pipelines.dflash_checkpoint(
        tmp_path / "dflash", hidden=models.HIDDEN, vocab=models.VOCAB, taps=TAPS, block_size=8
    )
    draft = pipelines.adapt(models.new(models.FAMILIES["qwen3"], 7))
    for family in ("qwen3_5-v2", "qwen3"):
        expected, _ = kv.plain(kv.stock(family), prompt, NEW_TOKENS, settings)
        base = pipelines.builder(kv.build(family)).kv_cache(4, 32, 12)
        for builder in (
            base.drafter("dflash", checkpoint=str(checkpoint)),
            base.drafter("autoregressive", model=draft),
        ):
            with builder.build() as pipeline:
                result = pipeline.generate(prompt, max_tokens=NEW_TOKENS)
            assert list(result.token_ids) == expected
            assert result.stats.drafted
            assert not result.stats.fell_back
