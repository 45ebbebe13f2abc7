"""Greedy text of further families with drafts that mislead on purpose: plain mlx-lm's, token for
token, and caches that hold what a fresh prefill holds.

Bit for bit until a sliding window wraps; after that keys stand in another order (1e-4 on keys and
values of deeper layers, and the same tokens).
"""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from draftloom.contracts import TargetAdapter
from draftloom.pipeline import GenerateOptions
from tests.support import models, pipelines
from tests.support.families_more import (
    GENERIC,
    MORE,
    RECURRENT,
    SLIDING,
    WINDOW,
    More,
    adapted,
    new_model,
)
from tests.support.oracle import greedy, prefill

NEW_TOKENS = 24
MODES = ("wrong", "half", "random", "mixed", "right", "short")
WINDOWED = [family.name for family in SLIDING] + ["recurrent_gemma"]
FAMILIES = MORE | GENERIC | RECURRENT
ASKED = (
    "phi3", "smollm3", "glm4_moe", "granite", "deepseek_v3", "llama-3.1",
    *(name for name in RECURRENT if name not in ("mamba2", "granitemoehybrid", "lfm2_moe")),
)  # fmt: skip
"""Families that get 200 cycles, besides those with a window and those of `test_generation`."""


def contents(entry: Any) -> list[np.ndarray]:
    """What a cache holds that later tokens may see, oldest first."""
    if isinstance(entry, CacheList):
        return [a for child in entry.caches for a in contents(child)]
    if isinstance(entry, RotatingKVCache):
        seen = min(entry.offset, entry.max_size - 1)
        both = [np.array(entry._temporal_order(a)) for a in (entry.keys, entry.values)]
        return [a[:, :, a.shape[2] - seen :] for a in both]
    if isinstance(entry, KVCache):
        return [np.array(a) for a in entry.keys_and_values()]
    if not isinstance(entry, ArraysCache):  # a family's own cache
        return [np.array(a) for _, a in tree_flatten(entry.state) if isinstance(a, mx.array)]
    return [np.array(a) for a in entry.cache if a is not None]


def check_caches(ours: list[Any], theirs: list[Any], exact: bool, near: float = 1e-4) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        for x, y in zip(contents(a), contents(b), strict=True):
            assert x.shape == y.shape
            assert np.array_equal(x, y) if exact else np.allclose(x, y, rtol=0, atol=near)


def cycles_of(family: More, wanted: int, rollback: str = "auto") -> int:
    """Generate, with one corruption and block size after the other, until enough cycles ran; where
    200 are wanted, until every block size was used."""
    stock, model = new_model(family), new_model(family)
    rng = np.random.default_rng(11)
    sizes, done = itertools.cycle(rng.permutation(np.arange(1, 17)).tolist()), 0
    texts = []
    for length in (3, 2 * WINDOW + 5):
        prompt = tuple(int(t) for t in rng.integers(models.VOCAB, size=length))
        texts.append((prompt, (*prompt, *greedy(stock, prompt, NEW_TOKENS + 16))))
    for turn in itertools.count():
        prompt, text = texts[turn % 2]
        start = len(prompt)
        mode, size = MODES[turn % len(MODES)], next(sizes)
        builder = pipelines.builder(model).drafter(
            "test.scripted", text=text, vocab_size=models.VOCAB, mode=mode, seed=turn
        )
        options = GenerateOptions(max_tokens=NEW_TOKENS, prefill_chunk=(7, 2048)[turn % 2])
        verifier = ("block", "block", "sequential")[turn % 3]
        with builder.block_size(size).verifier(verifier).rollback(rollback).build() as pipeline:
            engine = pipeline.engine(prompt, options)
            events = list(engine.cycles())
        emitted = tuple(t for event in events for t in event.token_ids)
        assert emitted == text[start : start + NEW_TOKENS], f"{mode}, blocks of {size}, {verifier}"
        assert not engine.stats.fell_back, engine.stats.fell_back
        if turn < 6:
            fresh = prefill(stock, text[: start + NEW_TOKENS - 1])
            near = 1e-5 if family.name in WINDOWED else 1e-4
            check_caches(engine.cache, fresh, exact=False, near=near)
        done += len(events) - 1
        if done >= wanted and (wanted < 200 or turn >= 15):
            return done
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_families_keep_their_text_over_200_cycles(name: str) -> None:
    assert cycles_of(FAMILIES[name], 200) >= 200


@pytest.mark.parametrize("name", ["llama-sliding", "gemma4", "gpt_oss"])
def test_sliding_families_keep_their_text(name: str) -> None:
    assert cycles_of(FAMILIES[name], 60) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-sliding", "gemma4"])
def test_a_snapshot_serves_sliding_windows_too(name: str) -> None:
    assert cycles_of(FAMILIES[name], 60, "snapshot") >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WINDOWED])
def test_other_families_keep_their_text(name: str) -> None:
    wanted = 200 if name in ASKED else 50
    assert cycles_of(FAMILIES[name], wanted) >= wanted


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_generic_targets_keep_their_text(name: str) -> None:
    assert cycles_of(GENERIC[name], 20) >= 20


@pytest.mark.parametrize("drafter", ["prompt-lookup", "autoregressive"])
@pytest.mark.parametrize("name", ["lfm2", "nemotron_h", "gemma3_text"])
def test_drafters_that_need_no_taps_serve_them(name: str, drafter: str) -> None:
    family = FAMILIES[name]
    prompt = (1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3)
    builder = pipelines.builder(new_model(family))
    with adapted(family) as draft:
        options: dict[str, TargetAdapter] = {} if drafter == "prompt-lookup" else {"model": draft}
        with builder.drafter(drafter, **options).block_size(4).build() as pipeline:
            result = pipeline.generate(prompt, max_tokens=NEW_TOKENS)
    assert list(result.token_ids) == greedy(new_model(family), prompt, NEW_TOKENS)
    assert result.stats.drafted
    if drafter == "autoregressive":  # the model drafts for itself
        assert result.stats.acceptance_rate == 1.0


@pytest.mark.parametrize("name", [family.name for family in SLIDING])
def test_until_the_window_wraps_caches_are_equal_bit_for_bit(name: str) -> None:
    family = FAMILIES[name]
    stock = new_model(family)
    text = [int(t) for t in np.random.default_rng(2).integers(models.VOCAB, size=WINDOW)]
    builder = pipelines.builder(new_model(family)).drafter("none")
    with builder.build() as pipeline:
        parts = pipeline._parts
        cache = parts.target.make_cache()
        position = 0
        for width, keep in ((3, 1), (0, 0), (4, 2), (2, 1)):
            junk = [(t + 1) % models.VOCAB for t in text]
            right = text[position : position + keep + 1]
            block = mx.array([right + junk[: width - keep]])
            speculation = parts.open_speculation(cache, block)
            parts.verifier.verify(parts.target, block, speculation)
            speculation.commit((keep,))
            position += keep + 1
            check_caches(cache, prefill(stock, text[:position]), exact=True)
        assert position == WINDOW
