"""Recurrent hybrids that record a tape: LFM2's convolution, Mamba-2, Kimi's delta rule.

A text is walked block by block, with junk after a drawn place, and committed to drawn counts. What
the caches then hold is compared with stock mlx-lm decoding the same text token by token: bit for
bit on the CPU. (Kimi's attention layers run one token in another order than several, also in stock
mlx-lm; there, what its recurrent layers see differs by about 1e-6 from the second of them on.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, make_prompt_cache
from mlx_lm.models.gated_delta import gated_delta_ops
from mlx_lm.models.ssm import ssm_attn

from draftloom.abilities import Tunable
from draftloom.caches.tape_replay import TapeReplayRollback
from draftloom.composite import CompositeRollback
from draftloom.contracts import CacheKind, TargetAdapter
from draftloom.errors import UsageError
from draftloom.kernel_settings import KernelSettings
from draftloom.kernels import gated_delta, ssm
from draftloom.kernels.ssm import reference
from draftloom.model_info import ModelInfo
from draftloom.verifiers.block import BlockVerifier
from draftloom.verifiers.sequential import SequentialVerifier
from tests.support import models, pipelines
from tests.support.families_more import RECURRENT, adapted, new_model

TEXT = [int(t) for t in np.random.default_rng(4).integers(models.VOCAB, size=70)]
PREFILLED = 5
WALK = ((4, 4, 2), (3, 1, 0), (0, 0, 0), (5, 5, 5), (15, 9, 6), (2, 2, 1), (1, 1, 1), (7, 7, 3))
"""(K, num_accepted of the first commit, of the second)."""
EXACT = [name for name in RECURRENT if name != "kimi_linear"]


def contents(entry: Any) -> list[np.ndarray]:
    """What a cache holds."""
    if isinstance(entry, CacheList):
        return [a for child in entry.caches for a in contents(child)]
    if isinstance(entry, KVCache):
        return [np.array(a) for a in entry.keys_and_values()] if entry.offset else []
    assert isinstance(entry, ArraysCache)
    return [np.array(a) for a in entry.cache if a is not None]


@lru_cache(maxsize=8)
def stock_run(name: str) -> tuple[list[np.ndarray], list[list[list[np.ndarray]]]]:
    """Logits after each token of the text, and what the caches hold: a prefill, then steps."""
    model = new_model(RECURRENT[name])
    cache = make_prompt_cache(model)
    first = model(mx.array([TEXT[:PREFILLED]]), cache=cache)
    logits = [np.array(first)[0, i] for i in range(PREFILLED)]
    held: list[list[list[np.ndarray]]] = [[] for _ in range(PREFILLED)]
    held.append([contents(entry) for entry in cache])
    for token in TEXT[PREFILLED:48]:
        logits.append(np.array(model(mx.array([[token]]), cache=cache))[0, 0])
        held.append([contents(entry) for entry in cache])
    return logits, held


def rollback_of(target: TargetAdapter, strategy: str) -> CompositeRollback:
    plugins = pipelines.plugins()
    kinds = {
        kind: plugins.component(
            "rollback",
            strategy if strategy == "snapshot" else str(plugins.rollback_for(kind, target.info)),
        ).make({})
        for kind in set(target.info.cache_kinds)
    }
    if strategy == "deferred":
        for rollback in kinds.values():
            if isinstance(rollback, Tunable):
                rollback.tune(KernelSettings.of({"replay-verify": "on"}))
    return CompositeRollback(kinds, target)


def apart(ours: list[Any], theirs: list[list[np.ndarray]]) -> float:
    """Largest difference between caches; 0.0 is bit for bit."""
    largest = 0.0
    for entry, expected in zip(ours, theirs, strict=True):
        for a, b in zip(contents(entry), expected, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            largest = max(largest, float(np.abs(a - b).max(initial=0)))
    return largest


def walk(name: str, strategy: str, verifier: Any) -> tuple[float, float]:
    """Largest differences of logits and of caches along the walk."""
    expected, held = stock_run(name)
    logits_apart = caches_apart = 0.0
    with adapted(RECURRENT[name]) as target:
        rollback, cache = rollback_of(target, strategy), target.make_cache()
        target.forward(mx.array([TEXT[:PREFILLED]]), cache)
        position = PREFILLED
        for width, keep, settle in WALK:
            right = TEXT[position : position + keep + 1]
            junk = [(t + 1) % models.VOCAB for t in TEXT[position + keep + 1 :]]
            block = mx.array([right + junk[: width - keep]])
            begun = rollback.begin(cache, block)
            target.forward(block, begun.cache)
            begun.abort()
            caches_apart = max(caches_apart, apart(cache, held[position]))

            begun = rollback.begin(cache, block)
            rows = np.array(verifier.verify(target, block, begun).logits)[0, : keep + 1]
            wanted = np.stack(expected[position : position + keep + 1])
            logits_apart = max(logits_apart, float(np.abs(rows - wanted).max()))
            for count in (keep, settle):
                begun.commit((count,))
                caches_apart = max(caches_apart, apart(cache, held[position + count + 1]))
            position += settle + 1
    return logits_apart, caches_apart


@pytest.mark.parametrize("verifier", [BlockVerifier(), SequentialVerifier()], ids=["block", "one"])
@pytest.mark.parametrize("name", EXACT)
def test_replay_equals_plain_decoding_bit_for_bit(name: str, verifier: Any) -> None:
    assert walk(name, "auto", verifier) == (0.0, 0.0)


@pytest.mark.parametrize("name", [*EXACT, "kimi_linear"])
def test_layers_that_cannot_share_a_launch_replay_at_the_commit(name: str) -> None:
    """With `replay-verify` on; Kimi's blocks are close, not exact, as they are without it."""
    assert walk(name, "deferred", SequentialVerifier()) == (0.0, 0.0)
    assert walk(name, "deferred", BlockVerifier()) == walk(name, "auto", BlockVerifier())


def test_kimi_is_exact_token_by_token_and_close_in_blocks() -> None:
    assert walk("kimi_linear", "auto", SequentialVerifier()) == (0.0, 0.0)
    logits, caches = walk("kimi_linear", "auto", BlockVerifier())
    assert logits < 1e-4
    assert caches < 1e-4


@pytest.mark.parametrize("name", RECURRENT)
def test_a_snapshot_comes_to_the_same(name: str) -> None:
    """Where the layer is but a convolution, bit for bit. mlx-lm's block form of Mamba-2, which a
    snapshot runs, adds in another order than its single steps, and that adds up over the walk."""
    logits, caches = walk(name, "snapshot", BlockVerifier())
    if name.startswith("lfm2"):
        assert (logits, caches) == (0.0, 0.0)
    assert logits < 1e-3
    assert caches < 1e-3


@pytest.mark.parametrize("name", RECURRENT)
def test_what_is_chosen_for_them(name: str) -> None:
    with adapted(RECURRENT[name]) as target:
        kinds = set(target.info.cache_kinds) - {CacheKind.ATTENTION}
        assert kinds == set(target.info.tape_kinds)
        assert {pipelines.plugins().rollback_for(k, target.info) for k in kinds} == {"tape-replay"}
        recurrent = [e for e in target.make_cache() if not isinstance(e, KVCache)]
        block = mx.array([[1, 2, 3]])
        layers = [TapeReplayRollback().begin(entry, block) for entry in recurrent]
        everything = iter(layers)
        entries = [
            e if isinstance(e, KVCache) else next(everything).entry for e in target.make_cache()
        ]
        target.forward(block, entries)
        for layer in layers:
            entry = layer.entry[0] if isinstance(recurrent[0], CacheList) else layer.entry
            assert len(entry.windows) == 1, "a layer did not record"


@pytest.mark.parametrize("name", RECURRENT)
def test_rows_may_keep_counts_of_their_own(name: str) -> None:
    """Only the recurrent entries: a key/value cache with one offset cannot do it."""
    if name == "falcon_h1":
        pytest.skip("its recurrent entries come with key/value caches")
    block = np.array([TEXT[:5], TEXT[10:15]])
    with adapted(RECURRENT[name]) as target:
        single = []
        for row, count in enumerate((3, 1)):
            cache = target.make_cache()
            begun = rollback_of(target, "auto").begin(cache, mx.array(block[row : row + 1]))
            target.forward(mx.array(block[row : row + 1]), begun.cache)
            begun.commit((count,))
            single.append(cache)
        cache = target.make_cache()
        layers = [
            None if isinstance(e, KVCache) else TapeReplayRollback().begin(e, mx.array(block))
            for e in cache
        ]
        entries = [e if s is None else s.entry for e, s in zip(cache, layers, strict=True)]
        target.forward(mx.array(block), entries)
        for index, layer in enumerate(layers):
            if layer is None:
                continue
            layer.commit((3, 1))
            for slot, value in enumerate(cache[index].cache):
                for row in range(2):
                    alone = np.array(single[row][index].cache[slot])
                    assert np.array_equal(np.array(value)[row : row + 1], alone)


@pytest.mark.parametrize("name", RECURRENT)
def test_close_puts_the_very_same_objects_back(name: str) -> None:
    model = new_model(RECURRENT[name])
    before = dict(model.named_modules())
    info = ModelInfo(name, None, RECURRENT[name].config)
    factory = pipelines.plugins().adapter_for(info).load()
    target = factory(model, factory.describe(info))
    assert [n for n, m in model.named_modules() if before.get(n) is not m]
    with pytest.raises(UsageError, match="in use by another pipeline"):
        factory(model, factory.describe(info))
    target.close()
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[n] is before[n] for n in before)


def test_a_cache_that_records_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="tape-replay cannot take back a KVCache"):
        TapeReplayRollback().begin(KVCache(), mx.array([[1, 2]]))


# --- the rules themselves ---------------------------------------------------------------------


def ssm_case(tokens: int, rows: int = 2) -> dict[str, mx.array]:
    rng = np.random.default_rng(tokens)

    def draw(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32))

    heads, size, groups, keys = 4, 8, 2, 16
    return {
        "x": draw(rows, tokens, heads, size), "A_log": draw(heads),
        "B": draw(rows, tokens, groups, keys), "C": draw(rows, tokens, groups, keys),
        "D": draw(heads), "dt": draw(rows, tokens, heads), "dt_bias": draw(heads),
        "state": draw(rows, heads, size, keys),
    }  # fmt: skip


def tape_of(case: dict[str, mx.array]) -> ssm.SsmTape:
    order = (case[n] for n in ("x", "B", "dt", "dt_bias", "A_log"))
    return ssm.tape_of(*order, limit=(0.0, float("inf")))


@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
def test_ssm_replay_equals_single_steps_of_mlx_lm(tokens: int) -> None:
    case = ssm_case(tokens)
    tape, state = tape_of(case), case["state"]
    assert tape.length == tokens
    for t in range(tokens):
        one = {n: v[:, t : t + 1] if n in ("x", "B", "C", "dt") else v for n, v in case.items()}
        _, state = ssm_attn(**(one | {"state": state}), time_step_limit=(0.0, float("inf")))
        assert mx.array_equal(ssm.replay(case["state"], tape, t + 1), state)
    assert mx.array_equal(ssm.replay(case["state"], tape, 0), case["state"])


@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_ssm_replay_is_close_to_the_reference_and_to_a_block(tokens: int) -> None:
    case = ssm_case(tokens)
    steps = mx.logaddexp(case["dt"] + case["dt_bias"], mx.array(0.0))
    rate = -mx.exp(case["A_log"])
    order = (case[n] for n in ("x", "B", "C"))
    y, states = reference.run(*order, steps, rate, case["D"], case["state"])
    block, end = ssm_attn(**case, time_step_limit=(0.0, float("inf")))
    assert mx.allclose(block, y, rtol=1e-4, atol=1e-4)
    assert mx.allclose(end, states[:, -1], rtol=1e-4, atol=1e-4)
    for n in {0, 1, tokens}:
        ours = ssm.replay(case["state"], tape_of(case), n)
        assert mx.allclose(ours, states[:, n], rtol=1e-4, atol=1e-4)


def test_ssm_replay_of_a_count_a_row_and_of_joined_tapes() -> None:
    case = ssm_case(6)
    tape, state = tape_of(case), case["state"]
    rows = ssm.replay(state, tape, mx.array([2, 5]))
    assert mx.array_equal(rows[0], ssm.replay(state, tape, 2)[0])
    assert mx.array_equal(rows[1], ssm.replay(state, tape, 5)[1])
    halves = [
        tape_of({n: v[:, cut] if n in ("x", "B", "dt") else v for n, v in case.items()})
        for cut in (slice(0, 4), slice(4, 6))
    ]
    joined = ssm.concat_tapes(halves)
    assert mx.array_equal(ssm.replay(state, joined, 5), ssm.replay(state, tape, 5))
    with pytest.raises(ValueError, match="7 entries of a tape of 6"):
        ssm.replay(state, tape, 7)
    with pytest.raises(ValueError, match="at least one"):
        ssm.concat_tapes([])


def test_gated_delta_with_a_decay_for_every_key_channel() -> None:
    rng = np.random.default_rng(8)

    def draw(*shape: int) -> mx.array:
        return mx.array(rng.uniform(0.1, 0.9, shape).astype(np.float32))

    rows, tokens, heads, size = 2, 7, 3, 32
    q, k, v = (draw(rows, tokens, heads, size) for _ in range(3))
    g, beta, state = draw(*q.shape), draw(rows, tokens, heads), draw(rows, heads, size, size)
    y, end = gated_delta_ops(q, k, v, g, beta, state)
    ours, tape, reached = gated_delta.verify(q, k, v, g, beta, state)
    assert reached is not None
    assert mx.array_equal(ours, y)
    assert mx.array_equal(reached, end)
    for n in range(tokens + 1):
        first = [a[:, :n] for a in (q, k, v, g, beta)]
        wanted = gated_delta_ops(*first, state)[1] if n else state
        assert mx.array_equal(gated_delta.replay(state, tape, n), wanted)
    for use in ("chunked", "cuda", "metal"):
        with pytest.raises(ValueError, match="cannot serve verify"):
            gated_delta.verify(q, k, v, g, beta, state, use=use)
