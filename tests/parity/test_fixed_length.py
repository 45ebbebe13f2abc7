"""Caches seen at their allocated length, as verify sees them on CUDA: the same logits, whatever the
family makes of its mask. (Run on the CPU here: the order of sums differs, so within 1e-4.)"""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from draftloom.caches.fixed_length import FixedLengthEntry
from draftloom.caches.trim import TrimRollback
from tests.support import models, pipelines
from tests.support.families_more import PLAIN, adapted, new_model

OURS = sorted(models.FAMILIES)
FURTHER = [family.name for family in PLAIN]


def tokens(count: int, start: int) -> mx.array:
    return mx.array([[(start + 7 * i) % models.VOCAB for i in range(count)]], dtype=mx.int32)


def check(target, stock) -> None:  # type: ignore[no-untyped-def]
    """A prompt, then blocks of which a part is kept, across the first growth of the buffers."""
    ours, theirs = target.make_cache(), make_prompt_cache(stock)
    assert any(type(entry) is KVCache for entry in ours)
    for cache, model in ((ours, target.model), (theirs, stock)):
        mx.eval(model(tokens(245, 1), cache=cache))
    rollback = TrimRollback(fixed_length=True)
    for start in (3, 11, 5):
        block = tokens(6, start)
        begun = [rollback.begin(e, block) if type(e) is KVCache else None for e in ours]
        entries = [e if b is None else b.entry for e, b in zip(ours, begun, strict=True)]
        logits = target.forward(block, entries).logits
        expected = stock(block, cache=theirs)
        assert mx.allclose(logits, expected, rtol=0, atol=1e-4)
        if all(b is not None for b in begun):  # others cannot be trimmed
            for b, entry in zip(begun, theirs, strict=True):
                b.commit((2,))  # type: ignore[union-attr]
                entry.trim(3)


@pytest.mark.parametrize("family", OURS)
def test_supported_families(family: str) -> None:
    with pipelines.adapter(models.build(family)) as target:
        check(target, models.stock(family))


@pytest.mark.parametrize("family", FURTHER)
def test_further_families(family: str) -> None:
    chosen = next(f for f in PLAIN if f.name == family)
    with adapted(chosen) as target:
        check(target, new_model(chosen))


def test_one_token_needs_no_mask_and_sees_valid_rows_only() -> None:
    cache = KVCache()
    entry = FixedLengthEntry(cache)
    row = mx.ones((1, 1, 3, 4))
    assert entry.make_mask(3).shape == (3, 256)  # type: ignore[union-attr]
    assert entry.update_and_fetch(row, row)[0].shape == (1, 1, 256, 4)
    assert entry.make_mask(1) is None
    assert entry.update_and_fetch(row[:, :, :1], row[:, :, :1])[0].shape == (1, 1, 4, 4)
    for length in (252, 300):
        grown = entry.make_mask(length)
        keys, _ = entry.update_and_fetch(mx.ones((1, 1, length, 4)), mx.ones((1, 1, length, 4)))
        assert grown is not None
        assert grown.shape[1] == keys.shape[2]
