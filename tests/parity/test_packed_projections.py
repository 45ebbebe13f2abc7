"""One product against separate ones: the same bits on the CPU, the same memory, put back after."""

from __future__ import annotations

import gc
import importlib
import logging
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen2, qwen3, qwen3_5, qwen3_moe, qwen3_next
from mlx_lm.models.cache import make_prompt_cache

import draftloom
from draftloom import KernelSettings
from draftloom.adapters import packed as packed_module
from draftloom.adapters.packed import OPERATION, SITES, PackedModel
from draftloom.kernels import packed_projections
from draftloom.kernels.packed_projections import OneProduct, ProductStack, plan, why_not
from tests.support import families_more, models
from tests.unit import fakes

SIZES = (96, 32, 32, 8)
WIDTH = 128
WIDTHS = (*range(1, 17), 33)
FORMS = ["float32", "bfloat16", "float16", "4-bit", "8-bit", "4-bit-bfloat16", "8-bit-bfloat16"]


def linears(
    form: str, sizes: Sequence[int] = SIZES, bias: bool = False, width: int = WIDTH
) -> list[Any]:
    """Random layers over one input: plain in a type, or quantized."""
    mx.random.seed(3)
    made: list[Any] = [nn.Linear(width, size, bias=bias) for size in sizes]
    dtype = getattr(mx, form.rpartition("bit-")[2], mx.float32)
    for layer in made:
        if bias:
            layer.bias = mx.random.normal(layer.bias.shape)
        layer.set_dtype(dtype)
    if "bit" in form:
        made = [layer.to_quantized(group_size=32, bits=int(form[0])) for layer in made]
    mx.eval([layer.parameters() for layer in made])
    return made


def in_use() -> int:
    """Bytes of arrays, and of memory kept for later ones."""
    return mx.get_active_memory() + mx.get_cache_memory()


def same(one: Any, other: Any) -> bool:
    return bool(mx.array_equal(one, other)) and one.dtype == other.dtype


# --- the product ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_one_product_is_bit_equal_to_separate_ones(form: str, bias: bool) -> None:
    """Before and after the layers' weights become slices, and the layers alone after that."""
    layers = linears(form, bias=bias)
    dtype = layers[0].scales.dtype if "bit" in form else layers[0].weight.dtype
    inputs = [mx.random.normal((2, width, WIDTH)).astype(dtype) for width in WIDTHS]
    expected = [[layer(x) for layer in layers] for x in inputs]
    mx.eval(expected)
    product = OneProduct(layers)
    before = [product(x) for x in inputs]
    product.adopt()
    after = [product(x) for x in inputs]
    alone = [[layer(x) for layer in layers] for x in inputs]
    product.release()
    released = [[layer(x) for layer in layers] for x in inputs]
    for way in (before, after, alone, released):
        for wanted, found in zip(expected, way, strict=True):
            assert all(map(same, wanted, found))


@pytest.mark.parametrize("form", ["float32", "bfloat16", "8-bit", "4-bit"])
def test_a_stack_is_bit_equal_to_separate_layers(form: str) -> None:
    groups = [linears(form, (96, 32, 32)) for _ in range(3)]
    for group in groups[1:]:
        for layer in group:
            layer.weight = layer.weight[::-1]
    dtype = groups[0][0].scales.dtype if "bit" in form else groups[0][0].weight.dtype
    inputs = [mx.random.normal((2, width, WIDTH)).astype(dtype) for width in WIDTHS]
    expected = [[[layer(x) for layer in group] for group in groups] for x in inputs]
    mx.eval(expected)
    stack = ProductStack(groups, shared=2)
    for x, wanted in zip(inputs, expected, strict=True):
        for product, group in zip(stack.products, wanted, strict=True):
            assert all(map(same, product(x), group))
        keys, values = stack.over_all(x)
        assert keys.shape == (3, 2, x.shape[1], 32)
        for index, (_, key, value) in enumerate(wanted):
            assert same(keys[index], key)
            assert same(values[index], value)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "4-bit"])
def test_memory_does_not_double(form: str) -> None:
    """Bytes in use before packing, after it, after the first product and after release are those
    of the weights; other ways to hold them would show as twice as much."""
    layers = linears(form, (2048, 1024, 1024), bias=True, width=512)
    whole = sum(a.nbytes for layer in layers for _, a in tree_flatten(layer.parameters()))
    x = mx.zeros((1, 2, 512), dtype=layers[0].bias.dtype)
    gc.collect()
    mx.clear_cache()
    before = in_use()
    product = OneProduct(layers)
    product.adopt()
    used = [in_use()]
    mx.eval(product(x))
    used.append(in_use())
    product.release()
    del product
    used.append(in_use())
    mx.eval([layer(x) for layer in layers])
    used.append(in_use())
    assert all(abs(now - before) < 0.2 * whole for now in used), (before, used, whole)


def test_memory_of_a_stack_does_not_double() -> None:
    groups = [linears("float32", (1024, 512, 512), width=256) for _ in range(3)]
    whole = sum(layer.weight.nbytes for group in groups for layer in group)
    gc.collect()
    mx.clear_cache()
    before = in_use()
    stack = ProductStack(groups, shared=2)
    mx.eval(stack.over_all(mx.zeros((1, 2, 256))), stack.products[1](mx.zeros((1, 2, 256))))
    assert abs(in_use() - before) < 0.02 * whole


class Other(nn.Linear):
    """Not a linear layer like the others."""


def test_what_cannot_be_one_product() -> None:
    plain, half = linears("float32"), linears("bfloat16")
    four, eight = linears("4-bit"), linears("8-bit")
    cases = [
        ([plain[0]], "there is nothing to pack it with"),
        ([plain[0], Other(WIDTH, 8)], "b is a Other"),
        ([plain[0], four[0]], "a and b differ in kind of layer"),
        ([plain[0], nn.Linear(64, 8, bias=False)], "a and b differ in input size"),
        ([plain[0], half[0]], "a and b differ in type"),
        ([plain[0], nn.Linear(WIDTH, 8)], "a and b differ in bias"),
        ([four[0], eight[0]], "a and b differ in quantization"),
        ([four[0], nn.QuantizedLinear(WIDTH, 8, False, 64, 4)], "a and b differ in quantization"),
        ([four[0], nn.QuantizedLinear(WIDTH, 8, False, 32, 4, "mxfp4")], "a and b differ in"),
    ]
    for layers, words in cases:
        reason = why_not(dict(zip("ab", layers, strict=False)))
        assert reason is not None
        assert words in reason
        with pytest.raises(ValueError, match="no single product"):
            OneProduct(layers)
    assert why_not(dict(zip("abcd", plain, strict=True))) is None
    with pytest.raises(ValueError, match="no stack of products: the layers differ"):
        ProductStack([plain, linears("float32", (8, 8, 8, 8))], shared=1)
    with pytest.raises(ValueError, match="no stack of products: a layer has a bias"):
        ProductStack([linears("float32", bias=True)] * 2, shared=1)


def test_slices_that_wide_loads_cannot_start_at_become_arrays_of_their_own() -> None:
    """bfloat16 rows of 6 numbers: the second layer starts at byte 12 of the joined weights."""
    layers: list[Any] = [nn.Linear(6, 1, bias=False), nn.Linear(6, 3, bias=False)]
    for layer in layers:
        layer.set_dtype(mx.bfloat16)
    x = mx.random.normal((1, 4, 6)).astype(mx.bfloat16)
    expected = [layer(x) for layer in layers]
    mx.eval(expected)
    product = OneProduct(layers)
    product.adopt()
    kept = [layer.weight for layer in layers]
    product.release()
    assert layers[0].weight is kept[0]
    assert layers[1].weight is not kept[1]
    assert all(map(same, expected, [layer(x) for layer in layers]))


# --- in a model -------------------------------------------------------------------------------


ARGS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "vocab_size": 24,
    "max_position_embeddings": 128, "rope_theta": 1e4, "tie_word_embeddings": False,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "decoder_sparse_step": 1,
    "num_experts": 0, "num_experts_per_tok": 0, "mlp_only_layers": [], "moe_intermediate_size": 0,
    "shared_expert_intermediate_size": 0, "norm_topk_prob": False, "partial_rotary_factor": 0.5,
}  # fmt: skip


def made(kind: type, **changes: Any) -> Any:
    """A module of a class of `SITES`, with float32 weights."""
    module: Any = {
        m.__name__: m for m in (llama, qwen2, qwen3, qwen3_5, qwen3_moe, qwen3_next)
    }[kind.__module__]  # fmt: skip
    args_class = module.TextModelArgs if module is qwen3_5 else module.ModelArgs
    args = args_class.from_dict({"model_type": "x", **ARGS, **changes})
    mx.random.seed(5)
    if kind.__name__.endswith("MLP") and kind is not llama.MLP:
        found: Any = kind(32, 48)
    elif kind is qwen3_moe.Attention:
        found = kind(args, 0)
    else:
        found = kind(args)
    mx.eval(found.parameters())
    return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the products that were run."""
    seen: list[int] = []
    whole = OneProduct.__call__

    def count(self: OneProduct, x: mx.array) -> list[mx.array]:
        seen.append(x.shape[1])
        return whole(self, x)

    monkeypatch.setattr(OneProduct, "__call__", count)
    return seen


CLASSES: tuple[type, ...] = (
    qwen3_5.GatedDeltaNet, qwen3_next.Qwen3NextGatedDeltaNet, qwen3_next.Qwen3NextAttention,
    qwen3_next.Qwen3NextMLP, llama.Attention, llama.MLP, qwen2.Attention, qwen2.MLP,
    qwen3.Attention, qwen3.MLP, qwen3_moe.Attention, qwen3_moe.MLP,
)  # fmt: skip
"""Run one by one; the others are run in a model of their family."""


def name_of(kind: type) -> str:
    """As in `SITES`."""
    return f"{kind.__module__.removeprefix('mlx_lm.models.')}.{kind.__qualname__}"


def places_in(model: Any) -> list[str]:
    """The sites of a model by class."""
    return [name_of(type(m)) for _, m in model.named_modules() if packed_module._site_of(m)]


@pytest.mark.parametrize("kind", CLASSES, ids=name_of)
def test_every_class_gives_the_same_bits_with_one_product(kind: type, counted: list[int]) -> None:
    """The contract with mlx-lm: its own forward calls the layers with one array, once each."""
    owner = nn.Module()
    owner.inner = made(kind)
    inputs = [mx.random.normal((1, width, 32)) for width in (1, 5, 16)]
    expected = [owner.inner(x) for x in inputs]
    mx.eval(expected)
    before = dict(tree_flatten(owner.parameters()))
    packed = PackedModel(owner)
    packed.tune(KernelSettings.of({OPERATION: "packed"}))
    found = [owner.inner(x) for x in inputs]
    assert all(map(same, expected, found))
    assert counted == [1, 5, 16]
    packed.restore()
    after = dict(tree_flatten(owner.parameters()))
    assert after.keys() == before.keys()
    assert all(same(after[name], before[name]) for name in before)
    assert all(map(same, expected, [owner.inner(x) for x in inputs]))
    assert len(counted) == 3


def test_whatever_the_order_a_stand_in_gives_what_its_layer_gives(counted: list[int]) -> None:
    owner = nn.Module()
    owner.inner = made(qwen3.Attention)
    names = ("q_proj", "k_proj", "v_proj")
    layers = [owner.inner[name] for name in names]
    x, y = mx.random.normal((1, 3, 32)), mx.random.normal((1, 3, 32))
    expected = {(name, at): layer(v) for name, layer in zip(names, layers, strict=True)
                for at, v in (("x", x), ("y", y))}  # fmt: skip
    mx.eval(expected)
    packed = PackedModel(owner)
    packed.tune(KernelSettings.of({OPERATION: "attention"}))
    calls = [("k_proj", "y"), ("k_proj", "y"), ("q_proj", "x"), ("v_proj", "y"), ("k_proj", "x"),
             ("q_proj", "y"), ("v_proj", "x"), ("q_proj", "x"), ("q_proj", "x")]  # fmt: skip
    for name, at in calls:
        assert same(owner.inner[name]({"x": x, "y": y}[at]), expected[name, at])
    ran = len(counted)
    layers[1].weight = layers[1].weight * 2  # as after training: the product has the old weights
    again = x + 0
    assert same(owner.inner.k_proj(again), layers[1](x))
    assert not same(owner.inner.k_proj(again), expected["k_proj", "x"])
    assert same(owner.inner.q_proj(again), expected["q_proj", "x"])
    assert len(counted) == ran
    assert owner.inner.k_proj.weight is layers[1].weight


def test_a_model_says_what_it_leaves_apart(caplog: pytest.LogCaptureFixture) -> None:
    owner = nn.Module()
    owner.one, owner.two, owner.three = made(qwen3.MLP), made(qwen3.MLP), made(qwen3.Attention)
    owner.two.up_proj = owner.two.up_proj.to_quantized(group_size=32, bits=4)
    owner.three.k_proj = Other(32, 16, bias=False)
    packed = PackedModel(owner)
    packed.tune(KernelSettings.of({OPERATION: "packed"}))
    assert packed.refused == {
        "two": "gate_proj and up_proj differ in kind of layer",
        "three": "k_proj is a Other",
    }
    assert packed.decision is not None
    assert packed.decision.kinds == {"mlp"}
    packed.restore()
    del owner.one
    with caplog.at_level(logging.WARNING, "draftloom.kernels"):
        packed.tune(KernelSettings.of({OPERATION: "packed"}))
    assert "nothing can be packed: gate_proj and up_proj differ" in caplog.text
    packed.tune(KernelSettings())
    packed.tune(KernelSettings.of({OPERATION: "off"}))
    assert packed.decision is None
    owner.four = made(qwen3_5.GatedDeltaNet)
    owner.four.sharding_group = "of two"
    packed.tune(KernelSettings.of({OPERATION: "packed"}))
    assert packed.refused["four"] == "it is sharded over processes"


def linear_names(model: Any) -> list[str]:
    return sorted(path for path, module in model.named_modules() if type(module) is nn.Linear)


@pytest.mark.parametrize("choice", ["packed", "attention", "gated-delta", "mlp", "measure"])
@pytest.mark.parametrize("family", ["hybrid", "attention"])
def test_greedy_texts_are_those_of_mlx_lm(family: str, choice: str) -> None:
    model = fakes.model(family)
    names = linear_names(model)
    answer = fakes.plain(model, fakes.PROMPT, 40)

    def configure(builder: draftloom.PipelineBuilder) -> draftloom.PipelineBuilder:
        return builder.kernels({OPERATION: choice}).width(5)

    drafter = fakes.half_right(answer, 2)
    with fakes.pipeline_of(drafter, target=model, configure=configure) as pipeline:
        result = pipeline.generate(fakes.PROMPT, max_tokens=40)
        assert linear_names(model) != names or choice in ("measure", "gated-delta")
    assert result.token_ids == answer
    assert 0 < result.stats.acceptance_rate < 1
    assert linear_names(model) == names


def test_packing_a_model_never_needs_more_than_one_place_more() -> None:
    """Peak of arrays, and what is left in use, with six MLPs packed one after the other."""
    owner = nn.Module()
    owner.layers = [qwen3.MLP(256, 1024) for _ in range(6)]
    mx.eval(owner.parameters())
    gc.collect()
    mx.clear_cache()
    place, before = 2 * 256 * 1024 * 4, in_use()
    mx.reset_peak_memory()
    packed = PackedModel(owner)
    packed.tune(KernelSettings.of({OPERATION: "packed"}))
    assert packed.decision is not None
    assert packed.decision.kinds == {"mlp"}
    assert mx.get_peak_memory() < before + 1.1 * place
    assert in_use() < before + 0.1 * place
    packed.restore()
    del packed
    gc.collect()
    assert in_use() < before + 0.1 * place


@pytest.mark.parametrize("family", ["hybrid", "attention"])
def test_logits_of_blocks_are_bit_equal(family: str, counted: list[int]) -> None:
    model = models.stock("qwen3_5" if family == "hybrid" else "qwen3")
    tokens, block = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]), mx.array([[5, 3, 5, 8, 9, 7]])

    def logits() -> list[mx.array]:
        cache = make_prompt_cache(model)
        found = [model(tokens, cache=cache), model(block, cache=cache), model(block[:, :1], cache)]
        mx.eval(found)
        return found

    expected, packed = logits(), PackedModel(model)
    packed.tune(KernelSettings.of({OPERATION: "packed"}))
    assert all(map(same, expected, logits()))
    packed.restore()
    assert len(counted) == 3 * len(places_in(model))


def test_every_class_is_run_somewhere() -> None:
    """And is one of mlx-lm's: a name that it gave up fails here."""
    for name in SITES:
        module, _, qualified = name.rpartition(".")
        assert hasattr(importlib.import_module(f"mlx_lm.models.{module}"), qualified), name
    run = {name_of(kind) for kind in CLASSES}
    for family in families_more.MORE.values():
        run |= set(places_in(families_more.new_model(family)))
    assert set(SITES) == run


QUICK = ("gemma3_text", "glm4_moe", "gpt_oss", "granite")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in families_more.MORE],
)
def test_families_give_the_same_bits_and_leave_nothing_over(name: str, counted: list[int]) -> None:
    """One product a place and pass, of which every part is used."""
    model = families_more.new_model(families_more.MORE[name])
    tokens, block = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]), mx.array([[5, 3, 5, 8, 9, 7]])

    def logits() -> list[mx.array]:
        cache = make_prompt_cache(model)
        found = [model(tokens, cache=cache), model(block, cache=cache), model(block[:, :1], cache)]
        mx.eval(found)
        return found

    expected, places, packed = logits(), places_in(model), PackedModel(model)
    packed.tune(KernelSettings.of({OPERATION: "packed"}))
    assert packed.refused == {}
    assert all(map(same, expected, logits()))
    assert len(counted) == 3 * len(places)
    parts = [
        part for _, part in model.named_modules() if isinstance(part, packed_module.PackedPart)
    ]
    assert all(part._results._input is None for part in parts)
    packed.restore()


# --- the choice -------------------------------------------------------------------------------


def test_measuring_packs_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {8: {1: 0.5, 16: 0.8}, 4: {1: 0.9, 16: 1.2}, 2: {1: 1.0, 16: 0.99}}
    monkeypatch.setattr(plan, "ratios", lambda places, seconds: times[len(places)])
    groups = {"mlp": [[]] * 8, "attention": [[]] * 4, "gated-delta": [[]] * 2}
    found = plan.PLANS[OPERATION]["measure"].choose(groups)
    assert found.kinds == {"mlp"}
    assert "attention 0.90 at 1, 1.20 at 16" in found.reason


def test_measuring_runs_both_ways_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    groups = {"mlp": [linears("float32", (48, 48)) for _ in range(6)],
              "attention": [linears("4-bit", (32, 16, 16))]}  # fmt: skip
    weights = [layer.weight for places in groups.values() for ls in places for layer in ls]
    plan_ = plan._Measured(seconds=0.1)
    with caplog.at_level(logging.WARNING, "draftloom.kernels"):
        found = packed_projections.decide("packed-drafter", plan_, groups)
        assert not caplog.text
        packed_projections.decide("packed-drafter", "measure", groups)
    assert "packed-drafter: packs " in caplog.text
    assert "mlp" in found.reason
    again = [layer.weight for places in groups.values() for ls in places for layer in ls]
    assert all(a is b for a, b in zip(weights, again, strict=True)), "timing changed a layer"
    for by in (packed_projections.ratios(places, 0.05) for places in groups.values()):
        assert set(by) == {1, 16}
        assert all(0.05 < ratio < 20 for ratio in by.values())


def test_what_pays_is_what_auto_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plan.PLANS[OPERATION]
    assert not any(plans[name].by_default() for name in plans if name != "measure")  # type: ignore[attr-defined]
    monkeypatch.setitem(plan.PAYS[OPERATION], plan.backend(), frozenset({"mlp", "attention"}))
    pays = {name for name in plans if name != "measure" and plans[name].by_default()}  # type: ignore[attr-defined]
    assert pays == {"mlp", "attention"}
    model = fakes.model("hybrid")
    with draftloom.PipelineBuilder(plugins=fakes.plugins()).model(model).drafter("none").build():
        names = linear_names(model)
        assert any(name.endswith("up_proj.linear") for name in names)
        assert any(name.endswith("in_proj_z") for name in names)
    assert not any(name.endswith(".linear") for name in linear_names(model))


def test_the_checks_of_the_self_test_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [check for plans in plan.PLANS.values() for check in plans["packed"].checks()]  # type: ignore[attr-defined]
    assert len(checks) == 30
    assert all(check.run().passed for check in checks)
    monkeypatch.setattr(
        packed_projections.product, "_split", lambda x, ends: [x[..., ::-1] for _ in (0, *ends)]
    )
    for kind in ("mlp", "context"):
        check = next(check for check in checks if check.name.startswith(f"{kind} float32"))
        with pytest.raises(ValueError, match="gives shapes"):
            check.run()


def test_the_table_and_a_plan_of_a_third_party() -> None:
    groups = {"mlp": [linears("float32")]}
    assert packed_projections.decide(OPERATION, None, groups).kinds == packed_projections.pays(
        OPERATION
    ) & {"mlp"}
    assert not packed_projections.decide(OPERATION, "off", groups).kinds
    assert not packed_projections.decide(OPERATION, "packed", {}).kinds
    assert not packed_projections.decide(OPERATION, "attention", groups).kinds

    class Mine:
        def choose(self, groups: Any) -> packed_projections.Decision:
            return packed_projections.Decision(frozenset(groups), "mine")

    assert packed_projections.decide(OPERATION, Mine(), groups).reason == "mine"
