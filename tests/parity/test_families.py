"""Every supported family against stock mlx-lm: taps, logits, head, embeddings, and what is left
behind. Bit-equal on the CPU.

"Stock" is a second model with the same weights that no adapter has touched.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache

from draftloom.adapters import attention, qwen3_5
from draftloom.adapters.base import describe_model
from draftloom.caches.tape_replay import TapeReplayRollback
from draftloom.contracts import CacheKind, TargetAdapter
from draftloom.model_info import ModelInfo
from tests.support import cases, models, pipelines
from tests.support.models import Family
from tests.support.oracle import by_hand, same_caches, text_model

PASSES = (12, 5, 1, 1, 7, 1)
"""Tokens of each pass over one cache: a prefill, blocks, single steps."""
TEXT = [int(t) for t in np.random.default_rng(5).integers(models.VOCAB, size=(sum(PASSES)))]


def equal(ours: mx.array, theirs: mx.array) -> bool:
    """Bit for bit."""
    return ours.dtype == theirs.dtype and bool(mx.array_equal(ours, theirs))


def passes(rows: int = 1) -> list[mx.array]:
    text = mx.array([[(t + 3 * row) % models.VOCAB for t in TEXT] for row in range(rows)])
    ends = np.cumsum(PASSES)
    return [text[:, end - size : end] for size, end in zip(PASSES, ends, strict=True)]


def check_taps_and_logits(target: TargetAdapter, stock: nn.Module, rows: int = 1) -> None:
    """Logits of the whole, features of every layer, head and embeddings, over one cache."""
    layers = range(target.info.num_layers)
    order = [*reversed(layers)]
    target.tap(order)
    ours, theirs, hands = target.make_cache(), make_prompt_cache(stock), make_prompt_cache(stock)
    for tokens in passes(rows):
        output = target.forward(tokens, ours)
        logits = stock(tokens, cache=theirs)
        embeddings, *outputs, normed, by_layers = by_hand(stock, tokens, hands)
        assert equal(by_layers, logits), "the layers run by hand are not the model"
        assert equal(output.logits, logits), f"logits of {tokens.shape[1]} tokens"
        assert output.features is not None
        parts = mx.split(output.features, len(order), axis=-1)
        for layer, part in zip(order, parts, strict=True):
            assert equal(part, outputs[layer]), f"output of layer {layer}"
        assert equal(target.embed(tokens), embeddings), "embeddings"
        assert equal(target.head(normed), logits), "head"
    assert same_caches(ours, theirs)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_taps_logits_head_and_embeddings_equal_mlx_lms(family: str, rows: int) -> None:
    with pipelines.adapter(models.build(family)) as target:
        check_taps_and_logits(target, models.stock(family), rows)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", [family.name for family in models.HYBRID])
def test_a_recorded_pass_equals_mlx_lms(family: str, rows: int) -> None:
    """With the caches that record in place of the real ones, from empty caches on."""
    stock = models.stock(family)
    with pipelines.adapter(models.build(family)) as target:
        target.tap(range(target.info.num_layers))
        ours, theirs, hands = (
            target.make_cache(), make_prompt_cache(stock), make_prompt_cache(stock),
        )  # fmt: skip
        for tokens in passes(rows):
            begun = [
                None if isinstance(entry, KVCache) else TapeReplayRollback().begin(entry, tokens)
                for entry in ours
            ]
            entries = [e if b is None else b.entry for e, b in zip(ours, begun, strict=True)]
            output = target.forward(tokens, entries)
            assert equal(output.logits, stock(tokens, cache=theirs))
            outputs = by_hand(stock, tokens, hands)[1:-2]
            assert output.features is not None
            assert equal(output.features, mx.concatenate(outputs, axis=-1))
            for layer in filter(None, begun):
                if tokens.shape[1] > 1:  # the anchor alone needs no tape
                    assert len(layer.entry.tapes) == 1, "the layer did not record"
                layer.commit((tokens.shape[1] - 1,) * rows)
        assert same_caches(ours, theirs)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_description_tells_the_model(family: str) -> None:
    model = models.stock(family)
    info = ModelInfo.from_model(model)
    described = pipelines.plugins().adapter_for(info).load().describe(info)
    layers = text_model(model).model.layers
    linear = [getattr(layer, "is_linear", False) for layer in layers]
    kinds = [CacheKind.GATED_DELTA if is_linear else CacheKind.ATTENTION for is_linear in linear]
    assert list(described.cache_kinds) == kinds
    assert described.num_layers == len(layers)
    assert (described.vocab_size, described.hidden_size) == (models.VOCAB, models.HIDDEN)
    assert described.context_limit == 512
    assert described.tape_kinds == ((CacheKind.GATED_DELTA,) if any(linear) else ())


def test_layers_that_are_not_tapped_keep_their_place_and_taps_can_change() -> None:
    model = models.build("qwen3")
    before = list(text_model(model).model.layers)
    with pipelines.adapter(model, (1,)) as target:
        layers = text_model(model).model.layers
        assert [a is b for a, b in zip(layers, before, strict=True)] == [True, False, True]
        wide = target.forward(mx.array([[1, 2]]), target.make_cache()).features
        target.tap((2, 1))
        both = target.forward(mx.array([[1, 2]]), target.make_cache()).features
        assert wide is not None
        assert both is not None
        assert equal(both[..., models.HIDDEN :], wide)
        target.tap(())
        assert target.forward(mx.array([[1, 2]]), target.make_cache()).features is None
        assert [a is b for a, b in zip(layers, before, strict=True)] == [True] * 3


# --- what is served ---------------------------------------------------------------------------


def test_every_model_type_that_is_claimed_is_tested_here() -> None:
    tested = {family.config["model_type"] for family in models.FAMILIES.values()}
    assert set(attention.MODEL_TYPES) <= tested
    # The inner type of qwen3_5 and qwen3_5_moe, which mlx-lm does not load by itself.
    inner = {f"{name}_text" for name in tested}
    assert set(qwen3_5.MODEL_TYPES) <= tested | inner


def test_more_value_heads_than_key_heads_is_among_the_cases() -> None:
    ratios = {
        family.config["linear_num_value_heads"] // family.config["linear_num_key_heads"]
        for family in models.HYBRID
    }
    assert {1, 2, 4} <= ratios


LIKE_LLAMA = [f for f in models.CANDIDATES if f.name not in ("granite", "glm4")]


@pytest.mark.parametrize("family", LIKE_LLAMA, ids=lambda f: f.name)
def test_a_further_family_is_served_exactly(family: Family) -> None:
    """Those that can be run by hand as Llama can; test_more_families has all of them."""
    assert family.config["model_type"] in attention.FURTHER_MODEL_TYPES
    with pipelines.adapter(models.new(family)) as target:
        check_taps_and_logits(target, models.new(family))


# --- what is left behind ----------------------------------------------------------------------


def parts_of(model: nn.Module) -> dict[str, Any]:
    """Every submodule and array of a model by its path: the objects, not copies."""
    found: dict[str, Any] = dict(model.named_modules())
    found |= {f"{name} (array)": value for name, value in tree_flatten(model.parameters())}
    layers = text_model(model).model.layers
    return found | {f"layers[{i}]": layer for i, layer in enumerate(layers)} | {"list": layers}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_close_puts_the_very_same_objects_back(family: str, tmp_path: Path) -> None:
    model = models.build(family)
    before = parts_of(model)
    case = cases.Case(family, "dflash", "auto", "block", 4, (1, 2, 3))
    with cases.build(case, tmp_path).build() as pipeline:
        pipeline.generate((1, 2, 3), max_tokens=4)
        assert any(
            a is not b for a, b in zip(parts_of(model).values(), before.values(), strict=False)
        )
    after = parts_of(model)
    assert list(after) == list(before)
    assert [name for name in before if after[name] is not before[name]] == []


def fingerprint() -> dict[str, Any]:
    """Every attribute of every loaded module of mlx and mlx-lm and of the classes they define."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("mlx", "mlx_lm") or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, ModuleType):  # a submodule imported meanwhile
                continue
            found[f"{name}.{attribute}"] = value
            if isinstance(value, type) and value.__module__.partition(".")[0] in ("mlx", "mlx_lm"):
                found |= {f"{name}.{attribute}.{k}": v for k, v in list(vars(value).items())}
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Attributes that are another object now, or are new, in the modules there were before."""
    modules = {name.rpartition(".")[0] for name in before}
    new = [n for n in after if n not in before and n.rpartition(".")[0] in modules]
    return [n for n in before if after.get(n) is not before[n]] + new


def test_no_class_or_module_of_mlx_or_mlx_lm_is_patched(tmp_path: Path) -> None:
    before = fingerprint()
    assert len(before) > 2000
    during: list[str] = []
    for family in ("qwen3_5-v2", "qwen3_5_moe", "qwen3_next", "qwen3_moe", "llama-tied"):
        for drafter in ("dflash", "autoregressive-hybrid", "prompt-lookup", "cascade"):
            case = cases.Case(family, drafter, "auto", "block", 4, (1, 2, 3))
            with cases.build(case, tmp_path).acceptance("auto").build() as pipeline:
                during += changed(before, fingerprint())
                pipeline.generate((1, 2, 3), max_tokens=4)
                pipeline.generate((1, 2, 3), max_tokens=4, temperature=0.8, top_p=0.9, min_p=0.01)
                during += changed(before, fingerprint())
    assert during == []
    assert changed(before, fingerprint()) == []


def test_the_fingerprint_sees_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import qwen3

    before = fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(qwen3.Attention, "__call__", lambda *args: None)
        patch.setattr(mx.fast, "scaled_dot_product_attention", None)
        patch.setattr(nn.Linear, "record", True, raising=False)
        seen = changed(before, fingerprint())
    assert "mlx_lm.models.qwen3.Attention.__call__" in seen
    assert "mlx.core.fast.scaled_dot_product_attention" in seen
    assert any(name.endswith("Linear.record") for name in seen)
    assert changed(before, fingerprint()) == []


def test_describing_a_model_leaves_its_config_alone() -> None:
    family = models.FAMILIES["qwen3_5"]
    config = {**family.config, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    kept = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    describe_model(ModelInfo("x", None, config), "test")
    assert config == kept
