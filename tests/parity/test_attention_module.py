"""Stand-ins for attention modules with mlx-lm's own attention: the logits and caches of stock
mlx-lm, bit for bit on the CPU; and nothing left behind.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from mlx_lm.models import llama, qwen3
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from draftloom.adapters.attention_module import (
    KNOWN_CLASSES,
    AttentionLayers,
    AttentionModule,
    Weighting,
    attend_stock,
)
from draftloom.errors import UnsupportedModelError, UsageError
from tests.support import models, pipelines
from tests.support.families_more import MORE, More, adapted, new_model
from tests.support.oracle import same_caches, text_model

FAMILIES = sorted(models.FAMILIES)


def tokens(count: int, start: int, rows: int = 1) -> mx.array:
    return mx.array(
        [[(start + 7 * i + 5 * row) % models.VOCAB for i in range(count)] for row in range(rows)]
    )


def run(model: Any, cache: list[Any], rows: int = 1) -> list[mx.array]:
    """Logits of a prefill, a block, single steps and another block over one cache."""
    return [
        model(tokens(count, start, rows), cache=cache)
        for start, count in enumerate((11, 5, 1, 1, 6), start=3)
    ]


def equal(ours: list[mx.array], theirs: list[mx.array]) -> bool:
    return all(
        a.dtype == b.dtype and bool(mx.array_equal(a, b)) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_stand_ins_gives_mlx_lms_logits_and_caches(family: str, rows: int) -> None:
    stock = models.stock(family)
    with pipelines.adapter(models.build(family)) as target:
        assert len(target.attention) > 0
        target.attention.replace(AttentionModule)
        stands = [layer.get("self_attn") for layer in text_model(target.model).model.layers]
        assert sum(isinstance(s, AttentionModule) for s in stands) == len(target.attention)
        ours, theirs = make_prompt_cache(stock), make_prompt_cache(stock)
        assert equal(run(target.model, ours, rows), run(stock, theirs, rows))
        assert same_caches(ours, theirs)
        assert equal([target.model(tokens(4, 1))], [stock(tokens(4, 1))])  # without a cache


FURTHER = ("gpt_oss", "gemma3_text", "gemma3", "qwen2_moe")


def further(name: str) -> More:
    return MORE[name]


@pytest.mark.parametrize("name", FURTHER)
def test_further_families(name: str) -> None:
    stock = new_model(further(name))
    with adapted(further(name)) as target:
        target.attention.replace(AttentionModule)
        assert len(target.attention) == target.info.num_layers
        ours, theirs = make_prompt_cache(stock), make_prompt_cache(stock)
        assert equal(run(target.model, ours), run(stock, theirs))
        for a, b in zip(ours, theirs, strict=True):
            assert mx.array_equal(a.keys, b.keys)
            assert mx.array_equal(a.values, b.values)


def test_every_known_class_is_compared() -> None:
    """The classes that the models of these tests are made of are all that can be stood in for."""
    made = [models.stock(name) for name in FAMILIES] + [new_model(further(n)) for n in FURTHER]
    seen = {type(module) for model in made for module in model.modules() if "q_proj" in module}
    assert set(KNOWN_CLASSES) <= seen


@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(kind: mx.Dtype) -> None:
    for family in (models.FAMILIES["qwen3"], models.FAMILIES["qwen3_5"]):
        stock, model = models.new(family), models.new(family)
        for m in (stock, model):
            m.update(tree_map(lambda a: a.astype(kind), m.parameters()))
        AttentionLayers(text_model(model).model.layers, "x").replace(AttentionModule)
        ours, theirs = make_prompt_cache(stock), make_prompt_cache(stock)
        assert equal(run(model, ours), run(stock, theirs))


def test_packed_weights_and_packed_caches() -> None:
    family = models.FAMILIES["qwen3"]
    made = [models.new(family, hidden_size=64, intermediate_size=64, head_dim=32) for _ in range(2)]
    for model in made:
        nn.quantize(model, group_size=32, bits=4)
    stock, model = made
    AttentionLayers(model.model.layers, "x").replace(AttentionModule)
    ours, theirs = (
        [KVCache().to_quantized(32, 8) for _ in stock.layers],
        [KVCache().to_quantized(32, 8) for _ in stock.layers],
    )
    for cache in (*ours, *theirs):
        cache.keys = cache.values = None
    assert equal(run(model, ours), run(stock, theirs))


def sliding(name: str) -> tuple[nn.Module, nn.Module]:
    if name == "llama":
        return models.new(models.SLIDING), models.new(models.SLIDING)
    return new_model(further(name)), new_model(further(name))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma3_text"])
def test_sliding_layers_keep_their_rotating_cache_and_plain_ones_a_causal_mask(name: str) -> None:
    """What the attention kernel relies on: no plain cache of these families sees a window."""
    stock, model = sliding(name)
    seen: list[tuple[type, Any]] = []

    def watching(q: Any, k: Any, v: Any, cache: Any, how: Weighting) -> mx.array:
        seen.append((type(cache), how.mask))
        return attend_stock(q, k, v, cache, how)

    AttentionLayers(model.model.layers, "x").replace(
        lambda attention: AttentionModule(attention, attend=watching)
    )
    ours, theirs = make_prompt_cache(stock), make_prompt_cache(stock)
    assert equal(run(model, ours), run(stock, theirs))
    kinds = {kind for kind, _ in seen}
    assert kinds == {KVCache, RotatingKVCache}
    assert all(mask is None or mask == "causal" for kind, mask in seen if kind is KVCache)
    assert any(isinstance(mask, mx.array) for kind, mask in seen if kind is RotatingKVCache)


def test_what_was_replaced_comes_back() -> None:
    model = models.build("qwen3")
    before = [layer.self_attn for layer in model.model.layers]
    with pipelines.adapter(model) as target:
        assert [layer.self_attn for layer in model.model.layers] == before
        target.attention.replace(AttentionModule)
        target.attention.replace(AttentionModule)  # no stand-in of a stand-in
        assert target.attention.attentions == before
        assert [layer.self_attn.attention for layer in model.model.layers] == before
        with pytest.raises(UsageError, match="in use"):
            AttentionLayers(model.model.layers, "x")
    assert all(a.self_attn is b for a, b in zip(model.model.layers, before, strict=True))


def test_subclasses_and_other_classes_are_left_alone() -> None:
    class Own(qwen3.Attention):
        pass

    model = models.new(models.FAMILIES["qwen3"])
    for layer in model.model.layers:
        layer.self_attn = Own(model.args)
    layers = AttentionLayers(model.model.layers, "mine")
    assert len(layers) == 0
    with pytest.raises(UnsupportedModelError, match="mine"):
        layers.replace(AttentionModule)
    assert llama.Attention in KNOWN_CLASSES
