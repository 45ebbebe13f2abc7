"""A replay left to the next block: the same states, never from something stale, in bounded memory.

One gated-delta layer is driven by hand against the stock one, row by row, bit for bit. The whole
pipeline with deferred replay runs in test_speculation.py and test_generation.py.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ArraysCache, load_prompt_cache, save_prompt_cache

from draftloom.adapters import gated_delta
from draftloom.adapters.gated_delta import RecordingMixer, project_qwen3_5
from draftloom.caches.tape_replay import TapeReplayRollback
from draftloom.caches.trim import TrimRollback
from draftloom.composite import CompositeRollback
from draftloom.contracts import CacheKind
from draftloom.kernels import gated_delta as kernels
from draftloom.recording import Deferred, DeferredSlots
from tests.support import cases, models, pipelines
from tests.support.profile import examples

LENGTH = 64


class Layer:
    """One gated-delta layer, its stock twin's states along a few rows, and the calls it makes."""

    def __init__(self, family: str, monkeypatch: pytest.MonkeyPatch, rows: int = 1) -> None:
        stock: Any = models.stock(family)
        self.mixer = stock.language_model.layers[0].linear_attn
        self.layer = RecordingMixer(self.mixer, project_qwen3_5)
        rng = np.random.default_rng(5)
        values = rng.standard_normal((rows, LENGTH, models.HIDDEN))
        self.inputs = mx.array(values.astype(np.float32))
        self.fused = 0
        fused = gated_delta.replay_verify

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.fused += 1
            return fused(*args, **kwargs)

        monkeypatch.setattr(gated_delta, "replay_verify", counted)

    def expected(self, row: int, count: int) -> list[Any]:
        """The stock layer's slots after so many inputs of a row."""
        cache = ArraysCache(2)
        for i in range(count):
            self.mixer(self.inputs[row : row + 1, i : i + 1], None, cache)
        return list(cache.cache)

    def block(self, positions: Sequence[int], tokens: int) -> mx.array:
        """The next inputs of every row."""
        rows = [self.inputs[r, at : at + tokens] for r, at in enumerate(positions)]
        return mx.stack(rows)

    def check(self, cache: Any, positions: Sequence[int]) -> None:
        """Every row of the cache holds what the stock layer holds there."""
        for row, count in enumerate(positions):
            for slot, wanted in zip(cache.cache, self.expected(row, count), strict=True):
                found = None if slot is None else np.array(slot[row : row + 1])
                if wanted is None:
                    assert found is None or not found.any()
                else:
                    assert np.array_equal(found, np.array(wanted)), (row, count)


def marks(rows: int, tokens: int) -> mx.array:
    """What `begin` wants: a block of tokens."""
    return mx.zeros((rows, tokens), dtype=mx.int32)


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3_5-v4-conv3"])
def test_rows_that_keep_different_counts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(family, monkeypatch, rows=2)

    @examples(6, family)
    @given(
        st.lists(
            st.tuples(st.sampled_from((4, 2, 6, 3, 5, 1)), *[st.integers(1, 6)] * 3),
            min_size=3,
            max_size=5,
        )
    )
    def check(cycles: list[tuple[int, ...]]) -> None:
        rollback, cache = TapeReplayRollback(defer=True), ArraysCache(2)
        positions = [0, 0]
        for tokens, first, second, less in cycles:
            speculation = rollback.begin(cache, marks(2, tokens))
            output = layer.layer(layer.block(positions, tokens), None, speculation.entry)
            mx.eval(output)
            keep = [min(first, tokens), min(second, tokens)] if tokens > 1 else [1, 1]
            speculation.commit([n - 1 for n in keep])
            fewer = [min(n, less) for n in keep]
            speculation.commit([n - 1 for n in fewer])
            positions = [at + n for at, n in zip(positions, fewer, strict=True)]
            if less % 2:  # else nobody reads the lazy state before the next block
                layer.check(cache, positions)
        layer.check(cache, positions)

    check()
    assert layer.fused >= 10


def run(layer: Layer, rollback: Any, cache: Any, at: int, tokens: int, keep: int) -> Any:
    """One cycle; returns the speculation."""
    speculation = rollback.begin(cache, marks(1, tokens))
    mx.eval(layer.layer(layer.block([at], tokens), None, speculation.entry))
    speculation.commit((keep - 1,))
    return speculation


def test_the_next_block_replays_and_verifies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cache = Layer("qwen3_5-v2", monkeypatch), ArraysCache(2)
    rollback = TapeReplayRollback(defer=True)
    run(layer, rollback, cache, 0, 5, 3)
    assert layer.fused == 0, "there was nothing to replay yet"
    run(layer, rollback, cache, 3, 4, 4)
    run(layer, rollback, cache, 7, 6, 1)
    assert layer.fused == 2
    run(layer, rollback, cache, 8, 1, 1)
    run(layer, rollback, cache, 9, 3, 2)
    assert layer.fused == 2, "after a block of one the cache holds a state that was computed"
    layer.check(cache, [11])


def test_a_replay_that_nobody_looks_at_is_not_even_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    replay = kernels.replay

    def counted(state: mx.array, tape: Any, n: Any, **more: Any) -> mx.array:
        built.append(n)
        return replay(state, tape, n, **more)

    monkeypatch.setattr(kernels, "replay", counted)
    layer, cache = Layer("qwen3_5-v2", monkeypatch), ArraysCache(2)
    rollback = TapeReplayRollback(defer=True)
    for at in (0, 2, 4):
        run(layer, rollback, cache, at, 4, 2)
    assert layer.fused == 2
    assert not built
    mx.eval(cache.state)
    assert built == [2], "evaluating looks at the slots"
    layer.check(cache, [6])
    assert cache[1] is cache.cache[1] is list(cache.cache)[1]
    assert built == [2], "looked at more than once, made once"


@pytest.mark.parametrize("late", [False, True], ids=["there", "late"])
def test_deferred_slots_are_a_list_to_whoever_looks(late: bool) -> None:
    made: list[int] = []

    def replay(state: mx.array, tape: Any, count: Any) -> mx.array:
        made.append(count)
        return state + count

    def slots() -> DeferredSlots:
        made.clear()
        deferred = Deferred(mx.array([2.0]), None, 3, replay)
        if late:
            return DeferredSlots([mx.array([9.0])], deferred, lambda: [mx.array([1.0])])
        return DeferredSlots([mx.array([1.0])], deferred)

    def numbers(found: list[Any]) -> list[Any]:
        return [value.item() for value in found]

    assert len(slots()) == 2
    assert slots()[0].item() == 1.0
    assert not made, "the window is there"
    for found in (
        list(slots()), [*slots()], slots()[:], slots().copy(), copy.copy(slots()),
        copy.deepcopy(slots()), [slots()[0], slots()[1]], [slots()[-2], slots()[-1]],
        [value for _, value in tree_flatten(slots())], tree_map(lambda value: value, slots()),
    ):  # fmt: skip
        assert numbers(found) == [1.0, 5.0]
        assert getattr(found, "deferred", None) is None
    written = slots()
    written[0] = mx.array([7.0])
    assert written.deferred is not None
    written[1] = mx.array([8.0])
    assert written.deferred is None
    assert numbers(written) == [7.0, 8.0]


@pytest.mark.parametrize("defer", [False, True], ids=["commit-replays", "deferred"])
def test_a_commit_starts_the_work_of_all_layers_in_one_call_or_none(
    defer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pipelines.adapter(models.build("qwen3_5-v2")) as target:
        kinds = {
            CacheKind.GATED_DELTA: TapeReplayRollback(defer=defer),
            CacheKind.ATTENTION: TrimRollback(),
        }
        rollback, cache = CompositeRollback(kinds, target), target.make_cache()
        block = mx.array([[1, 2, 3, 4, 5]])
        speculation = rollback.begin(cache, block)
        mx.eval(target.forward(block, speculation.cache).logits)
        calls: list[list[mx.array]] = []
        monkeypatch.setattr(mx, "async_eval", calls.append)
        speculation.commit((1,))
        layers = [entry for entry in cache if isinstance(entry, ArraysCache)]
    assert len(layers) == 2
    if defer:
        assert not calls, "nothing is left to start"
    else:
        assert [len(call) for call in calls] == [2], "one array a layer, all at once"
        assert all(a is entry[1] for a, entry in zip(calls[0], layers, strict=True))


def test_rows_that_differ_share_one_array_of_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    replay = kernels.replay

    def counted(state: mx.array, tape: Any, n: Any, **more: Any) -> mx.array:
        given.append(n)
        return replay(state, tape, n, **more)

    monkeypatch.setattr(kernels, "replay", counted)
    layer = Layer("qwen3_5-v2", monkeypatch, rows=2)
    for keep in ((1, 3), (2, 2)):
        for _ in range(3):  # three layers of one model
            rollback, cache = TapeReplayRollback(), ArraysCache(2)
            speculation = rollback.begin(cache, marks(2, 4))
            layer.layer(layer.block([0, 0], 4), None, speculation.entry)
            speculation.commit([n - 1 for n in keep])
            layer.check(cache, keep)
    assert given[0] is given[1] is given[2]
    assert given[0].tolist() == [1, 3, 0, 0], "at least 16 bytes"
    assert given[3:] == [2, 2, 2], "a number where the rows agree"


def test_by_default_nothing_is_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cache = Layer("qwen3_5-v2", monkeypatch), ArraysCache(2)
    rollback = TapeReplayRollback()
    run(layer, rollback, cache, 0, 5, 3)
    run(layer, rollback, cache, 3, 4, 4)
    assert layer.fused == 0
    layer.check(cache, [7])


def test_abort_after_commit_can_be_built_on(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cache = Layer("qwen3_5-v2", monkeypatch), ArraysCache(2)
    rollback = TapeReplayRollback(defer=True)
    run(layer, rollback, cache, 0, 5, 3)
    run(layer, rollback, cache, 3, 4, 2).abort()
    layer.check(cache, [3])
    before = layer.fused
    run(layer, rollback, cache, 3, 4, 2)
    assert layer.fused == before + 1, "the replay is left to the next block once more"
    speculation = rollback.begin(cache, marks(1, 4))
    mx.eval(layer.layer(layer.block([5], 4), None, speculation.entry))
    speculation.abort()
    run(layer, rollback, cache, 5, 4, 3)
    assert layer.fused == before + 3, "an abort without a commit leaves the replay to the next"
    layer.check(cache, [8])


def overwritten(cache: ArraysCache) -> ArraysCache:
    cache[1] = cache[1] + 0.0
    return cache


def filtered(cache: ArraysCache) -> ArraysCache:
    cache.filter(mx.array([0]))
    return cache


def extracted(cache: ArraysCache) -> ArraysCache:
    other: ArraysCache = cache.extract(0)
    return other


def set_state(cache: ArraysCache) -> ArraysCache:
    slots, left, lengths = cache.state
    cache.state = ([x[:] for x in slots], left, lengths)
    return cache


@pytest.mark.parametrize("touch", [overwritten, filtered, extracted, copy.deepcopy, set_state])
def test_a_state_that_somebody_else_put_there_is_the_one_that_counts(
    touch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, cache = Layer("qwen3_5-v2", monkeypatch), ArraysCache(2)
    rollback = TapeReplayRollback(defer=True)
    run(layer, rollback, cache, 0, 5, 3)
    other = touch(cache)
    run(layer, rollback, other, 3, 5, 2)
    assert layer.fused == 0
    layer.check(other, [5])


def test_a_prompt_cache_is_saved_with_its_lazy_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layer, cache = Layer("qwen3_5-v2", monkeypatch), ArraysCache(2)
    rollback = TapeReplayRollback(defer=True)
    run(layer, rollback, cache, 0, 5, 3)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache])
    (loaded,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    layer.check(loaded, [3])
    run(layer, rollback, cache, 3, 5, 2)
    assert layer.fused == 1, "saving read the state and left it in its place"
    run(layer, rollback, loaded, 3, 5, 2)
    layer.check(loaded, [5])
    layer.check(cache, [5])


@pytest.mark.parametrize("choice", ["on", "off", "auto"])
def test_the_switch_of_a_pipeline_reaches_the_layers(
    choice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = Layer("qwen3_5-v2", monkeypatch)
    case = cases.Case("qwen3_5-v2", "scripted-half", "auto", "block", 5, (1, 2, 3))
    with cases.build(case, tmp_path).kernels({"replay-verify": choice}).build() as pipeline:
        result = pipeline.generate(list(case.prompt), max_tokens=16)
        assert ("replay-verify on" in pipeline.describe()) == (choice == "on")
    assert result.token_ids == case.trace.tokens[3:19]
    assert (calls.fused > 0) == (choice == "on"), "nothing is saved on a CPU: off there"


def test_a_finished_generation_leaves_nothing_undone(tmp_path: Path) -> None:
    case = cases.Case("qwen3_5-v2", "scripted-half", "deferred", "block", 5, (1, 2, 3))
    with cases.build(case, tmp_path).build() as pipeline:
        stream = pipeline.stream(list(case.prompt), max_tokens=16)
        result = stream.result(list(stream))
        count, found = 2 + len(result.token_ids), []
        reader = threading.Thread(
            target=lambda: found.append(case.trace.differences(stream.cache, count))
        )
        reader.start()
        reader.join()
    assert found == [[]], "another thread reads the caches"


STATE = 4 * 64 * 128 * 4
"""Bytes of a state in the memory tests: 4 heads of 64 x 128 float32."""


def wide(monkeypatch: pytest.MonkeyPatch) -> Layer:
    """A layer whose states outweigh everything else it holds."""
    family = models.FAMILIES["qwen3_5"]
    sizes = {"linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 64}
    monkeypatch.setitem(family.config, "full_attention_interval", 4)
    for name, value in sizes.items():
        monkeypatch.setitem(family.config, name, value)
    monkeypatch.setattr(models, "stock", lambda name: models.new(models.FAMILIES[name]))
    return Layer("qwen3_5", monkeypatch)


@pytest.mark.parametrize("read", [True, False], ids=["read", "unread"])
def test_memory_does_not_grow_over_300_cycles(read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths 1 to 5 in turn, everything kept or less; the lazy state is read by nobody, or by
    somebody every third cycle. Between cycles there are at most two states, as during verify: the
    one before the block and the one that that was replayed from, which is freed when the next
    block begins; and, where somebody read it, the one after."""
    layer, cache = wide(monkeypatch), ArraysCache(2)
    rollback = TapeReplayRollback(defer=True)
    mx.eval(layer.inputs, layer.mixer.parameters())
    gc.collect()
    start, held = mx.get_active_memory(), []
    speculation = None
    for cycle in range(300):
        tokens = 1 + (cycle * 7) % 5
        speculation = run(layer, rollback, cache, cycle % 50, tokens, 1 + (cycle * 3) % tokens)
        if read and cycle % 3 == 0:
            mx.eval(cache.cache)
        mx.synchronize()  # MLX's own thread lets go of what it was given a moment later
        held.append(mx.get_active_memory() - start)
    assert layer.fused >= 100
    assert max(held[100:]) <= max(held[:100]) + STATE / 8, "tapes differ in length, no more"
    assert max(held) < (4 if read else 3) * STATE
    assert min(held) > 0.9 * STATE, "states are not what fills the memory here"
    del speculation, cache
    gc.collect()
    assert mx.get_active_memory() - start < 0.5 * STATE, "a cache that is gone holds nothing"


def test_slots_that_could_not_be_made_are_asked_for_again() -> None:
    asked: list[int] = []

    def late() -> list[mx.array]:
        asked.append(len(asked))
        if len(asked) == 1:
            raise MemoryError("no room")
        return [mx.array([1.0])]

    deferred = Deferred(mx.array([2.0]), None, 3, lambda state, tape, count: state)
    slots = DeferredSlots([mx.array([9.0])], deferred, late)
    with pytest.raises(MemoryError):
        slots[0]
    assert slots[0].item() == 1.0
    assert slots.windows[0].item() == 1.0
    assert asked == [0, 1]
