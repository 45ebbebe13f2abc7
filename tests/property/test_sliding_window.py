"""Sliding windows: exact but for the order of keys.

A window that has wrapped holds its keys in another order after a block than after single steps,
which changes sums by about 1e-5: caches are compared by what the model makes of them, within 1e-4
of logits of size 5. A snapshot goes back bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import RotatingKVCache

from draftloom.caches.snapshot import SnapshotRollback
from draftloom.caches.trim import TrimRollback
from draftloom.composite import CompositeRollback
from draftloom.contracts import CacheKind, TargetAdapter
from draftloom.pipeline import GenerateOptions
from tests.support import models, pipelines
from tests.support.models import SLIDING, VOCAB
from tests.support.oracle import greedy, prefill
from tests.support.profile import examples

TOLERANCE = 1e-4
TOKENS = 20
WINDOW = SLIDING.config["sliding_window"]
STRATEGIES = [
    component.name
    for component in pipelines.plugins().components("rollback")
    if CacheKind.SLIDING_WINDOW in component.info.cache_kinds
]
TEXT = [int(t) for t in np.random.default_rng(2).integers(VOCAB, size=60)]
PROBE = mx.array([[3]], dtype=mx.int32)


@lru_cache(maxsize=1)
def stock() -> nn.Module:
    return models.new(SLIDING)


@lru_cache(maxsize=512)
def expected(text: tuple[int, ...]) -> np.ndarray:
    """Logits of a probe after a text, by plain mlx-lm."""
    cache = prefill(stock(), text) if text else stock().make_cache()
    return np.array(stock()(PROBE, cache=cache))


def check_probe(target: TargetAdapter, cache: list[Any], text: tuple[int, ...]) -> None:
    """What the model makes of the caches, which are put back bit for bit."""
    kinds = {CacheKind.SLIDING_WINDOW: SnapshotRollback(), CacheKind.ATTENTION: TrimRollback()}
    before = contents(cache)
    speculation = CompositeRollback(kinds, target).begin(cache, PROBE)
    found = np.array(target.forward(PROBE, speculation.cache).logits)
    speculation.abort()
    assert same(before, contents(cache)), "a snapshot does not restore"
    assert np.abs(found - expected(text)).max() < TOLERANCE, f"after {len(text)} tokens"


def contents(cache: list[Any]) -> list[Any]:
    """Everything in the caches, as NumPy."""
    return [
        {k: np.array(v) if isinstance(v, mx.array) else v for k, v in vars(entry).items()}
        for entry in cache
    ]


def same(before: list[Any], after: list[Any]) -> bool:
    """Bit for bit. Rows behind the end of a plain cache are no part of it."""
    for a, b in zip(before, after, strict=True):
        for key, x in a.items():
            y = b[key]
            if "max_size" not in a and key != "offset":
                x, y = (None if v is None or not a["offset"] else v for v in (x, y))
                x, y = (v if v is None else v[..., : a["offset"], :] for v in (x, y))
            if not np.array_equal(x, y):
                return False
    return True


def test_the_strategies_are_found() -> None:
    assert "snapshot" in STRATEGIES


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("verifier", ["block", "sequential"])
def test_text_equals_plain_mlx_lm(verifier: str, strategy: str) -> None:
    model = models.new(SLIDING)

    @examples(12, verifier, strategy)
    @given(
        st.sampled_from(["right", "wrong", "half", "mixed"]),
        st.integers(1, 16),
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14).map(tuple),
    )
    def check(mode: str, block_size: int, prompt: tuple[int, ...]) -> None:
        text = (*prompt, *greedy(stock(), prompt, TOKENS + 16))
        builder = pipelines.builder(model).drafter(
            "test.scripted", text=text, vocab_size=VOCAB, mode=mode
        )
        builder = builder.rollback({"sliding-window": strategy}).verifier(verifier)
        with builder.block_size(block_size).build() as pipeline:
            engine = pipeline.engine(prompt, GenerateOptions(max_tokens=TOKENS))
            count = len(prompt)
            for event in engine.cycles():
                assert event.token_ids == text[count : count + len(event.token_ids)]
                count += len(event.token_ids)
                check_probe(pipeline._parts.target, engine.cache, text[: count - 1])
            assert not engine.stats.fell_back

    check()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("prefilled", [0, 3, WINDOW - 1, WINDOW, WINDOW + 1, 20])
@pytest.mark.parametrize("width", [0, 1, 5, 12])
def test_commit_is_absolute_and_abort_restores(width: int, prefilled: int, strategy: str) -> None:
    """The caches are reached by a prefill and by single steps, which leave rings of two kinds."""
    make = pipelines.plugins().component("rollback", strategy).make
    for steps, passes in ((0, 1), (3, 1), (3, width + 1)):
        with pipelines.adapter(models.new(SLIDING)) as target:
            kinds = {CacheKind.SLIDING_WINDOW: make({}), CacheKind.ATTENTION: TrimRollback()}
            rollback, cache = CompositeRollback(kinds, target), target.make_cache()
            assert isinstance(cache[0], RotatingKVCache)
            if prefilled:
                target.forward(mx.array([TEXT[:prefilled]]), cache)
            start = prefilled + steps
            for token in TEXT[prefilled:start]:
                target.forward(mx.array([[token]]), cache)
            block = mx.array([TEXT[start : start + width + 1]], dtype=mx.int32)
            for kept in {width, width // 2, 0}:
                speculation = rollback.begin(cache, block)
                for part in mx.split(block, passes, axis=1):
                    mx.eval(target.forward(part, speculation.cache).logits)
                speculation.commit((kept,))
                check_probe(target, cache, tuple(TEXT[: start + kept + 1]))
                speculation.commit((kept // 2,))
                check_probe(target, cache, tuple(TEXT[: start + kept // 2 + 1]))
                speculation.abort()
                check_probe(target, cache, tuple(TEXT[:start]))
