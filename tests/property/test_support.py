"""That the oracle of these tests is what it says, and that its texts can show a mistake."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from tests.support import models
from tests.support.oracle import greedy, greedy_trace, prefill, same_caches

PROMPT = (1, 2, 3, 4, 5)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_prefill_in_any_chunks_is_the_run_token_by_token(family: str) -> None:
    """The bit-equality of rows that every other comparison here rests on."""
    trace, model = greedy_trace(family, PROMPT, 40), models.stock(family)
    whole = prefill(model, trace.tokens[:33])
    for chunk in (1, 4, 7, 16):
        assert same_caches(prefill(model, trace.tokens[:33], chunk), whole)
    assert not trace.differences(whole, 33)
    for count in (1, 2, 3, 17):
        assert not trace.differences(prefill(model, trace.tokens[:count]), count)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_trace_is_mlx_lms_own_text(family: str) -> None:
    trace = greedy_trace(family, PROMPT, 40)
    assert list(trace.tokens[5:]) == greedy(models.stock(family), PROMPT, 40)
    logits = mx.array(trace.logits)[4:-1]
    best = mx.argmax(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=-1)
    assert best.tolist() == list(trace.tokens[5:])


@pytest.mark.parametrize("family", models.FAMILIES)
def test_texts_vary(family: str) -> None:
    trace = greedy_trace(family, PROMPT, 40)
    assert len(set(trace.tokens[5:])) >= 6, "nothing could be learnt from such a text"
    logits = trace.logits[4:]
    top = np.exp(logits.max(-1)) / np.exp(logits).sum(-1)
    assert top.mean() < 0.95


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3_next", "qwen3"])
def test_the_comparison_sees_one_bit_and_one_token(family: str) -> None:
    """No test here could fail if this one did not hold."""
    trace, model = greedy_trace(family, PROMPT, 40), models.stock(family)
    cache = prefill(model, trace.tokens[:12])
    assert trace.differences(cache, 11)
    assert trace.differences(cache, 13)
    other = prefill(model, [*trace.tokens[:11], (trace.tokens[11] + 1) % models.VOCAB])
    assert len(trace.differences(other, 12)) == sum(
        2 if isinstance(entry, KVCache) else len(entry.cache) for entry in cache
    )
    for entry in cache:
        if isinstance(entry, KVCache):
            entry.keys[0, 0, 3, 0] += 1e-6 * mx.abs(entry.keys[0, 0, 3, 0])
        else:
            entry.cache[1] = entry.cache[1] * (1 + 1e-6)
    assert len(trace.differences(cache, 12)) == len(cache)
