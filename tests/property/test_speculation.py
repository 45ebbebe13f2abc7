"""Begin, verify, commit and abort, driven by hand: no drafter and no acceptance policy between.

A text is walked block by block. Blocks agree with it up to a drawn position and are junk after;
a drawn number of tokens is committed, then fewer, with aborts in between. The caches must be
those of a fresh prefill of the text, bit for bit, and nothing of the junk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import attrs
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache

from draftloom.caches.snapshot import SnapshotRollback
from draftloom.caches.tape_replay import TapeReplayRollback
from draftloom.caches.trim import TrimRollback
from draftloom.composite import CompositeRollback
from draftloom.contracts import CacheKind, TargetAdapter
from draftloom.verifiers.block import BlockVerifier
from draftloom.verifiers.sequential import SequentialVerifier
from tests.support import cases, models
from tests.support.oracle import Trace, trace
from tests.support.pipelines import adapter
from tests.support.profile import examples

LENGTH = 80
HYBRIDS = [family.name for family in models.HYBRID]
VERIFIERS = {"block": BlockVerifier(), "sequential": SequentialVerifier()}
STRATEGIES: dict[str, dict[CacheKind, Any]] = {
    "auto": {CacheKind.GATED_DELTA: TapeReplayRollback, CacheKind.ATTENTION: TrimRollback},
    "snapshot": {CacheKind.GATED_DELTA: SnapshotRollback, CacheKind.ATTENTION: SnapshotRollback},
    "replay+snapshot": {
        CacheKind.GATED_DELTA: TapeReplayRollback,
        CacheKind.ATTENTION: SnapshotRollback,
    },
    "snapshot+trim": {CacheKind.GATED_DELTA: SnapshotRollback, CacheKind.ATTENTION: TrimRollback},
    "deferred": {
        CacheKind.GATED_DELTA: partial(TapeReplayRollback, defer=True),
        CacheKind.ATTENTION: TrimRollback,
    },
    "deferred+snapshot": {
        CacheKind.GATED_DELTA: partial(TapeReplayRollback, defer=True),
        CacheKind.ATTENTION: SnapshotRollback,
    },
}


def strategies_for(family: str) -> tuple[str, ...]:
    """The strategies that differ for a family."""
    return tuple(STRATEGIES) if family in HYBRIDS else cases.rollbacks_for(family)


@lru_cache(maxsize=64)
def text_trace(family: str, row: int) -> Trace:
    """A random text, not the model's own, and the stock model's caches along it."""
    rng = np.random.default_rng(1000 + row)
    text = [int(t) for t in rng.integers(models.VOCAB, size=LENGTH)]
    return trace(models.stock(family), [text])


@attrs.frozen
class Cycle:
    """One block.

    Attributes:
        width: K.
        agree: tokens of the block, past the anchor, that are the text's.
        keep: num_accepted of the first commit; may reach into the junk.
        settle: num_accepted of the last commit, at most both of the above.
        disturb: what happens before the block is verified for good.
    """

    width: int
    agree: int
    keep: int
    settle: int
    disturb: str


DISTURBANCES = ("none", "abort-at-once", "abort-midway", "abort-verified", "abort-committed")


@st.composite
def cycles(draw: Any) -> Cycle:
    width = draw(st.integers(0, 15))
    agree, keep = draw(st.integers(0, width)), draw(st.integers(0, width))
    settle = draw(st.integers(0, min(agree, keep)))
    return Cycle(width, agree, keep, settle, draw(st.sampled_from(DISTURBANCES)))


def block_at(text: Sequence[int], start: int, width: int, agree: int) -> list[int]:
    """[anchor, d1 .. dK], right up to `agree` and wrong at every place after."""
    right = list(text[start : start + width + 1])
    return [t if i <= agree else (t + 1 + i) % models.VOCAB for i, t in enumerate(right)]


def disturb(
    kind: str, rollback: CompositeRollback, target: TargetAdapter, cache: list[Any], block: mx.array
) -> None:
    """Begin and take it all back at some point."""
    if kind == "none":
        return
    speculation = rollback.begin(cache, block)
    if kind == "abort-midway":
        half = block[:, : max(1, block.shape[1] // 2)]
        mx.eval(target.forward(half, speculation.cache).logits)
    elif kind in ("abort-verified", "abort-committed"):
        target.forward(block, speculation.cache)
    if kind == "abort-committed":
        speculation.commit((block.shape[1] // 2,))
        speculation.commit((0,))
    speculation.abort()


def walk(family: str, strategy: str, verifier: str, prefilled: int, blocks: Sequence[Cycle]) -> int:
    """Walk along the text; returns the cycles run."""
    expected = text_trace(family, 0)
    done, position = 0, prefilled
    with adapter(models.build(family)) as target:
        kinds = {kind: make() for kind, make in STRATEGIES[strategy].items()}
        rollback = CompositeRollback(kinds, target)
        cache = target.make_cache()
        if prefilled:
            target.forward(mx.array([expected.tokens[:prefilled]]), cache)
        for cycle in blocks:
            if position + cycle.width + 1 > LENGTH:
                break
            tokens = block_at(expected.tokens, position, cycle.width, cycle.agree)
            block = mx.array([tokens], dtype=mx.int32)
            disturb(cycle.disturb, rollback, target, cache, block)
            assert not expected.differences(cache, position), f"{cycle} at {position}: abort"

            speculation = rollback.begin(cache, block)
            logits = np.array(VERIFIERS[verifier].verify(target, block, speculation).logits)[0]
            right = expected.logits[position : position + cycle.agree + 1]
            assert np.array_equal(logits[: cycle.agree + 1], right), f"{cycle}: logits"

            speculation.commit((cycle.keep,))
            if cycle.keep <= cycle.agree:
                different = expected.differences(cache, position + cycle.keep + 1)
                assert not different, f"{cycle} at {position}: {different}"
            speculation.commit((cycle.settle,))
            different = expected.differences(cache, position + cycle.settle + 1)
            assert not different, f"{cycle} at {position}, less: {different}"
            position += cycle.settle + 1
            done += 1
        speculation = rollback.begin(cache, mx.array([[0, 1, 2]]))
        target.forward(mx.array([[0, 1, 2]]), speculation.cache)
        speculation.commit((1,))
        speculation.abort()
        assert not expected.differences(cache, position), "abort after the last cycle"
    return done


@pytest.mark.parametrize("family", models.FAMILIES)
def test_commit_is_absolute_and_abort_restores(family: str) -> None:
    tried = 0

    @examples(5, family)
    @given(
        st.sampled_from(strategies_for(family)),
        st.sampled_from(list(VERIFIERS)),
        st.integers(0, 20),
        st.lists(cycles(), min_size=1, max_size=5),
    )
    def check(strategy: str, verifier: str, prefilled: int, blocks: list[Cycle]) -> None:
        nonlocal tried
        tried += walk(family, strategy, verifier, prefilled, blocks)

    check()
    assert tried >= 5


# --- more than one row -----------------------------------------------------------------------


@pytest.mark.parametrize("family", HYBRIDS)
def test_tape_replay_keeps_a_count_of_its_own_for_every_row(family: str) -> None:
    @examples(6, family)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        rows = data.draw(st.integers(2, 3))
        width = data.draw(st.integers(0, 15))
        counts = data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
        fewer = [data.draw(st.integers(0, n)) for n in counts]
        passes = data.draw(st.sampled_from((1, 2)))
        prefilled = data.draw(st.integers(0, 9))
        _check_rows(family, prefilled, width, (counts, fewer), passes)

    check()


def _check_rows(
    family: str, prefilled: int, width: int, commits: Sequence[Sequence[int]], passes: int
) -> None:
    """Only the gated-delta layers: a key/value cache with one offset cannot do it."""
    rows = len(commits[0])
    expected = [text_trace(family, row) for row in range(rows)]
    blocks = [
        block_at(t.tokens, prefilled, width, count)
        for t, count in zip(expected, commits[0], strict=True)
    ]
    block = mx.array(blocks, dtype=mx.int32)
    with adapter(models.build(family)) as target:
        cache = target.make_cache()
        if prefilled:
            target.forward(mx.array([t.tokens[:prefilled] for t in expected]), cache)
        rollback = TapeReplayRollback()
        layers = [
            None if isinstance(entry, KVCache) else rollback.begin(entry, block) for entry in cache
        ]
        entries = [
            entry if layer is None else layer.entry
            for entry, layer in zip(cache, layers, strict=True)
        ]
        half = (width + 1) // passes
        parts = [block[:, :half], block[:, half:]] if half else [block]
        logits = [target.forward(p, entries).logits for p in parts if p.shape[1]]
        found = np.array(mx.concatenate(logits, axis=1))
        for row, count in enumerate(commits[0]):
            right = expected[row].logits[prefilled : prefilled + count + 1]
            assert np.array_equal(found[row, : count + 1], right), f"logits of row {row}"
        for counts in commits:
            for layer in filter(None, layers):
                layer.commit(tuple(counts))
            for row, count in enumerate(counts):
                _check_slots(cache, expected[row], row, prefilled + count + 1)
        for layer in filter(None, layers):
            layer.abort()
        for row in range(rows):
            _check_slots(cache, expected[row], row, prefilled)


def _check_slots(cache: list[Any], expected: Trace, row: int, count: int) -> None:
    for entry, wanted in zip(cache, expected.entries, strict=True):
        if isinstance(entry, KVCache):
            continue
        for slot, value in zip(entry.cache, wanted[count], strict=True):
            if value is None:
                assert slot is None
            else:
                assert np.array_equal(np.array(slot)[row : row + 1], value), f"row {row}"


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3_next"])
def test_rows_that_accept_the_same_count_go_back_together(family: str, strategy: str) -> None:
    expected = [text_trace(family, row) for row in range(2)]
    with adapter(models.build(family)) as target:
        kinds = {kind: make() for kind, make in STRATEGIES[strategy].items()}
        rollback = CompositeRollback(kinds, target)
        cache, position = target.make_cache(), 4
        target.forward(mx.array([t.tokens[:position] for t in expected]), cache)
        for width, keep in ((5, 5), (5, 3), (3, 0), (0, 0), (7, 6)):
            rows = [block_at(t.tokens, position, width, keep) for t in expected]
            block = mx.array(rows, dtype=mx.int32)
            speculation = rollback.begin(cache, block)
            BlockVerifier().verify(target, block, speculation)
            speculation.commit((keep, keep))
            position += keep + 1
            for row, wanted in enumerate(expected):
                assert not _row_of(cache, row, wanted, position)


def _row_of(cache: list[Any], row: int, expected: Trace, count: int) -> list[str]:
    """`differences`, of one row of the caches."""
    single = []
    for entry in cache:
        if isinstance(entry, KVCache):
            other = KVCache()
            other.keys, other.values = entry.keys[row : row + 1], entry.values[row : row + 1]
            other.offset = entry.offset
            single.append(other)
        else:
            single.append(entry.extract(row))
    return expected.differences(single, count)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_counts_that_cannot_be_kept_are_refused_and_leave_no_trace(strategy: str) -> None:
    family = "qwen3_5-v2"
    expected = [text_trace(family, row) for row in range(2)]
    with adapter(models.build(family)) as target:
        kinds = {kind: make() for kind, make in STRATEGIES[strategy].items()}
        cache = target.make_cache()
        target.forward(mx.array([t.tokens[:4] for t in expected]), cache)
        block = mx.array([t.tokens[4:8] for t in expected])
        speculation = CompositeRollback(kinds, target).begin(cache, block)
        BlockVerifier().verify(target, block, speculation)
        with pytest.raises(ValueError, match="different counts"):
            speculation.commit((1, 3))
        speculation.abort()
        for row, wanted in enumerate(expected):
            assert not _row_of(cache, row, wanted, 4)


def test_a_rollback_that_cannot_begin_leaves_the_caches_alone() -> None:
    aborted: list[Any] = []

    class Eager(TapeReplayRollback):
        """Empties the cache it is given, and puts it back when told to."""

        def begin(self, entry: Any, block: mx.array) -> Any:
            speculation, before = super().begin(entry, block), entry.cache
            entry.cache = [None, None]
            restore = speculation.abort

            def abort() -> None:
                restore()
                entry.cache = before
                aborted.append(entry)

            speculation.abort = abort  # type: ignore[method-assign]
            return speculation

    class Broken(SnapshotRollback):
        def begin(self, entry: Any, block: mx.array) -> Any:
            raise RuntimeError("no room for a copy")

    family = "qwen3_5-v4-conv3"
    expected = text_trace(family, 0)
    with adapter(models.build(family)) as target:
        kinds = {CacheKind.GATED_DELTA: Eager(), CacheKind.ATTENTION: Broken()}
        cache = target.make_cache()
        target.forward(mx.array([expected.tokens[:6]]), cache)
        with pytest.raises(RuntimeError, match="no room"):
            CompositeRollback(kinds, target).begin(cache, mx.array([[1, 2]]))
        assert len(aborted) == 3
        assert not expected.differences(cache, 6)
