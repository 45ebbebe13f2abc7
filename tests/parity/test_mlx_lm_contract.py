"""What draftloom relies on inside mlx-lm, in one place: mlx-lm moves internals between versions.

`COVERED` lists every name the project imports from mlx-lm; one that is not in it, or not tested
below, fails. When mlx-lm moves on, this file says what to adapt.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import tokenizer_utils
from mlx_lm.generate import (
    DEFAULT_QUANTIZED_KV_START,
    GenerationResponse,
    generate_step,
    maybe_quantize_kv_cache,
    wired_limit,
)
from mlx_lm.models import qwen3
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.models.gated_delta import compute_g, normalize_qk
from mlx_lm.models.qwen3_5 import GatedDeltaNet
from mlx_lm.models.qwen3_next import Qwen3NextGatedDeltaNet
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.ssm import compute_dt, ssm_update
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import (
    MODEL_REMAPPING,
    _get_classes,
    dequantize_model,
    get_total_parameters,
    load_model,
)

from draftloom.adapters.hybrids import _MIXERS, _is_recurrent
from draftloom.adapters.recurrent import RecordingConvolution, RecordingMamba
from draftloom.kv_cache import KVQuantization
from tests.support import families_more, models
from tests.support.oracle import prefill, text_model

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "adapters", "apps", "caches", "drafters", "kernels", "verifiers")
COVERED = {
    "mlx_lm",
    # Attention modules that stand-ins are written after: tests/parity/test_attention_module.py
    "mlx_lm.models.base.scaled_dot_product_attention",
    "mlx_lm.models.gemma3_text",
    "mlx_lm.models.gpt_oss",
    "mlx_lm.models.llama",
    "mlx_lm.models.qwen2",
    "mlx_lm.models.qwen2_moe",
    "mlx_lm.models.qwen3",
    "mlx_lm.models.qwen3_moe",
    "mlx_lm.models.qwen3_next.Qwen3NextAttention",
    # The norm behind the gated delta rule: tests/parity/test_gated_delta_inputs.py
    "mlx_lm.models.qwen3_next.Qwen3NextRMSNormGated",
    "mlx_lm.utils.MODEL_REMAPPING",
    "mlx_lm.tokenizer_utils",
    "mlx_lm.generate.GenerationResponse",
    "mlx_lm.generate.generate_step",
    "mlx_lm.generate.maybe_quantize_kv_cache",
    "mlx_lm.generate.wired_limit",
    "mlx_lm.models.cache.ArraysCache",
    "mlx_lm.models.cache.CacheList",
    "mlx_lm.models.cache.KVCache",
    "mlx_lm.models.cache.QuantizedKVCache",
    "mlx_lm.models.cache.RotatingKVCache",
    "mlx_lm.models.cache.make_prompt_cache",
    "mlx_lm.models.gated_delta.compute_g",
    "mlx_lm.models.gated_delta.normalize_qk",
    "mlx_lm.models.qwen3_5.GatedDeltaNet",
    "mlx_lm.models.qwen3_next.Qwen3NextGatedDeltaNet",
    "mlx_lm.models.rope_utils.initialize_rope",
    "mlx_lm.models.ssm.compute_dt",
    "mlx_lm.models.ssm.ssm_update",
    "mlx_lm.sample_utils.apply_min_p",
    "mlx_lm.sample_utils.apply_top_k",
    "mlx_lm.sample_utils.apply_top_p",
    "mlx_lm.sample_utils.make_logits_processors",
    "mlx_lm.tokenizer_utils.TokenizerWrapper",
    "mlx_lm.utils._get_classes",
    "mlx_lm.utils.dequantize_model",
    "mlx_lm.utils.get_total_parameters",
    "mlx_lm.utils.load_model",
}
TOKENIZER = ROOT / "adapters" / "bundled" / "python-17m" / "target"


def imported_names() -> dict[str, str]:
    """Names that the project imports from mlx-lm, and a file that does."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            where = str(file.relative_to(ROOT))
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                else:
                    continue
                found |= {n: where for n in names if n.split(".")[0] == "mlx_lm"}
    return found


def test_nothing_of_mlx_lm_is_imported_that_is_not_covered_here() -> None:
    imported = imported_names()
    assert len(imported) > 10, "the sources were not found"
    surplus = {name: where for name, where in imported.items() if name not in COVERED}
    assert not surplus, f"cover them here, or do without: {surplus}"


# --- caches -----------------------------------------------------------------------------------


def rows(tokens: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, 1, 2, tokens, 4)).astype(np.float32)
    return mx.array(keys), mx.array(values)


def test_kv_cache_appends_and_trims_by_its_offset() -> None:
    cache = KVCache()
    assert (cache.keys, cache.values, cache.offset) == (None, None, 0)
    keys, values = rows(9)
    cache.update_and_fetch(keys[:, :, :6], values[:, :, :6])
    assert cache.trim(4) == 4
    assert cache.offset == 2
    again, _ = cache.update_and_fetch(keys[:, :, 2:9], values[:, :, 2:9])
    assert mx.array_equal(again, keys)
    ours, theirs = cache.keys_and_values()
    assert mx.array_equal(ours, keys)
    assert mx.array_equal(theirs, values)
    assert cache.keys.shape[2] == cache.step == 256
    cache.trim(100)
    assert cache.offset == 0
    assert isinstance(cache.state, tuple)


def test_a_kv_cache_is_packed_in_its_list_once_it_is_long_enough() -> None:
    long, short, state = KVCache(), KVCache(), ArraysCache(2)
    keys, values = (mx.repeat(a, 8, axis=-1) for a in rows(9))  # 32 numbers a head
    long.update_and_fetch(keys, values)
    short.update_and_fetch(keys[:, :, :8], values[:, :, :8])
    cache = [long, short, state]
    maybe_quantize_kv_cache(cache, quantized_kv_start=9, kv_group_size=32, kv_bits=8)
    packed = cache[0]
    assert isinstance(packed, QuantizedKVCache)
    assert (packed.offset, packed.group_size, packed.bits) == (9, 32, 8)
    assert cache[1:] == [short, state]
    wanted = mx.quantize(keys, group_size=32, bits=8)
    held = packed.keys_and_values()[0]
    assert all(mx.array_equal(a, b) for a, b in zip(held, wanted, strict=True))
    assert packed.trim(4) == 4
    again, _ = packed.update_and_fetch(keys[:, :, 5:7], values[:, :, 5:7])
    assert all(mx.array_equal(a, b[:, :, :7]) for a, b in zip(again, wanted, strict=True))
    with pytest.raises(NotImplementedError):
        RotatingKVCache(8).to_quantized(32, 8)
    with pytest.raises(ValueError, match="group size"):
        short.to_quantized(64, 8)
    assert inspect.signature(generate_step).parameters["kv_group_size"].default == 64
    assert KVQuantization(8).quantized_kv_start == DEFAULT_QUANTIZED_KV_START


def test_kv_cache_grows_without_losing_rows() -> None:
    cache = KVCache()
    keys, values = rows(300)
    for start, end in ((0, 250), (250, 260), (260, 300)):
        cache.update_and_fetch(keys[:, :, start:end], values[:, :, start:end])
    assert mx.array_equal(cache.keys_and_values()[0], keys)


def test_quantized_kv_cache_trims_by_its_offset() -> None:
    cache = QuantizedKVCache(group_size=32, bits=8)
    keys = mx.random.normal((1, 2, 6, 32), key=mx.random.key(0))
    cache.update_and_fetch(keys, keys)
    assert cache.trim(2) == 2
    assert cache.offset == 4
    assert isinstance(cache.state, tuple)


def test_arrays_cache_replaces_its_entries_whole() -> None:
    """Keeping the old arrays is keeping the old state: nothing is written in place."""
    cache = ArraysCache(size=2)
    assert cache.cache == [None, None]
    assert cache.lengths is None
    assert cache.left_padding is None
    assert cache.make_mask(3) is None
    assert not hasattr(cache, "trim")
    model = models.stock("qwen3_5")
    caches = prefill(model, [1, 2, 3])
    kept = [list(c.cache) for c in caches if isinstance(c, ArraysCache)]
    copies = [[np.array(a) for a in arrays] for arrays in kept]
    model(mx.array([[4, 5]]), cache=caches)
    mx.eval([c.state for c in caches])
    for arrays, values in zip(kept, copies, strict=True):
        for array, value in zip(arrays, values, strict=True):
            assert np.array_equal(np.array(array), value)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next"])
def test_arrays_cache_holds_window_and_state(name: str) -> None:
    model = models.stock(name)
    entry = prefill(model, [1, 2, 3])[0]
    mixer = text_model(model).model.layers[0].linear_attn
    window, state = entry.cache
    assert window.shape == (1, mixer.conv_kernel_size - 1, mixer.conv_dim)
    assert state.shape == (1, mixer.num_v_heads, mixer.head_v_dim, mixer.head_k_dim)
    assert state.dtype == mx.float32


def test_make_prompt_cache_gives_the_models_own_kinds() -> None:
    kinds = [type(c) for c in make_prompt_cache(models.stock("qwen3_5"))]
    assert kinds == [ArraysCache, KVCache, ArraysCache, KVCache]
    assert [type(c) for c in make_prompt_cache(models.stock("qwen3"))] == [KVCache] * 3
    sliding = make_prompt_cache(models.new(models.SLIDING))
    assert [type(c) for c in sliding] == [RotatingKVCache, KVCache, RotatingKVCache]
    assert sliding[0].max_size == 8


# --- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.FAMILIES)
def test_models_have_the_parts_that_adapters_use(family: str) -> None:
    model = models.stock(family)
    text = text_model(model)
    assert isinstance(text.model.layers, list), "taps exchange its entries in place"
    assert {"hidden_size", "vocab_size", "tie_word_embeddings"} <= set(vars(text.args))
    assert isinstance(text.model.embed_tokens, nn.Embedding)
    assert isinstance(text.model.norm, nn.RMSNorm)
    assert hasattr(text, "lm_head") != text.args.tie_word_embeddings
    assert vars(model.args)["model_type"] == models.FAMILIES[family].config["model_type"]


@pytest.mark.parametrize("name", families_more.RECURRENT)
def test_recurrent_layers_have_the_parts_that_recording_uses(name: str) -> None:
    model = families_more.new_model(families_more.RECURRENT[name])
    attribute, stand = _MIXERS[families_more.RECURRENT[name].model_type]
    mixers = [layer[attribute] for layer in model.layers if _is_recurrent(layer, attribute)]
    assert mixers
    for mixer in mixers:
        if stand is RecordingConvolution:
            assert isinstance(mixer.conv, nn.Conv1d)
        elif stand is RecordingMamba:
            assert isinstance(mixer.conv1d, nn.Conv1d)
            order = ["hidden_states", "B", "C", "dt", "cache", "mask"]
            assert list(inspect.signature(mixer._ssm).parameters) == order
            for part in ("num_heads", "head_dim", "n_groups", "ssm_state_size", "time_step_limit"):
                assert hasattr(mixer, part)
            assert mixer.dt_bias.shape == mixer.A_log.shape == (mixer.num_heads,)
        else:
            assert all(isinstance(mixer[f"{n}_conv"].conv, nn.Conv1d) for n in "qkv")
            order = ["x", "state", "mask", "lengths"]
            assert list(inspect.signature(type(mixer.q_conv).__call__).parameters)[1:] == order


def test_cache_lists_have_children() -> None:
    children = (ArraysCache(2), KVCache())
    assert CacheList(*children).caches == children
    assert CacheList(*children)[0] is children[0]


def test_compute_dt_is_a_softplus_within_limits() -> None:
    dt, bias = mx.array([[[-3.0, 0.0, 90.0]]]), mx.array([0.5, 0.0, 0.0])
    found = np.array(compute_dt(dt, bias, (0.1, 50.0)))
    assert found == pytest.approx(np.clip(np.logaddexp(np.array(dt + bias), 0), 0.1, 50.0))


def test_ssm_update_goes_on_from_a_state() -> None:
    order = ["hidden_states", "A_log", "B", "C", "D", "dt", "dt_bias", "state", "time_step_limit"]
    assert list(inspect.signature(ssm_update).parameters)[:10] == [*order, "mask"]
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32))

    x, b, c, dt = normal(1, 2, 2, 4), normal(1, 2, 1, 32), normal(1, 2, 1, 32), normal(1, 2, 2)
    fixed, state = (normal(2), normal(2), normal(2)), normal(1, 2, 4, 32)
    whole, end = ssm_update(x, fixed[0], b, c, fixed[1], dt, fixed[2], state, (0.1, 9.0), None)
    parts = []
    for t in range(2):
        one = [v[:, t : t + 1] for v in (x, b, c, dt)]
        y, state = ssm_update(
            one[0], fixed[0], *one[1:3], fixed[1], one[3], fixed[2], state, (0.1, 9.0), None
        )
        parts.append(y)
    assert mx.allclose(mx.concatenate(parts, axis=1), whole, atol=1e-4)
    assert mx.allclose(state, end, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "projections"),
    [
        ("qwen3_5", GatedDeltaNet, ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
        ("qwen3_5_moe", GatedDeltaNet, ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
        ("qwen3_next", Qwen3NextGatedDeltaNet, ("in_proj_qkvz", "in_proj_ba")),
    ],
)
def test_gated_delta_layers_have_the_parts_that_recording_uses(
    name: str, kind: type, projections: tuple[str, ...]
) -> None:
    layers = text_model(models.stock(name)).model.layers
    assert [layer.is_linear for layer in layers] == [True, False, True, False]
    mixer = layers[0].linear_attn
    assert type(mixer) is kind
    for part in (*projections, "conv1d", "norm", "out_proj"):
        assert isinstance(getattr(mixer, part), nn.Module), part
    assert mixer.key_dim == mixer.num_k_heads * mixer.head_k_dim
    assert mixer.A_log.shape == mixer.dt_bias.shape == (mixer.num_v_heads,)
    assert getattr(mixer, "sharding_group", None) is None
    signature = list(inspect.signature(kind.__call__).parameters)
    assert signature == ["self", "inputs", "mask", "cache"]


def test_decay_and_normalisation_are_those_of_the_rule() -> None:
    rng = np.random.default_rng(0)
    a_log, a, bias = rng.standard_normal(3), rng.standard_normal((1, 5, 3)), rng.standard_normal(3)
    g = compute_g(*(mx.array(x.astype(np.float32)) for x in (a_log, a, bias)))
    assert np.allclose(np.array(g), np.exp(-np.exp(a_log) * np.log1p(np.exp(a + bias))), atol=1e-6)
    q, k = rng.standard_normal((2, 1, 5, 3, 8))
    ours = normalize_qk(
        mx.array(q.astype(np.float32)), mx.array(k.astype(np.float32)), inv_scale=8**-0.5, eps=1e-6
    )
    unit_q, unit_k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    assert np.allclose(np.array(ours[0]), unit_q * 8**-0.5, atol=1e-6)
    assert np.allclose(np.array(ours[1]), unit_k, atol=1e-6)


def test_rope_rotates_halves_at_absolute_positions() -> None:
    x = np.random.default_rng(0).standard_normal((1, 1, 3, 8)).astype(np.float32)
    rope = initialize_rope(
        8, base=100.0, traditional=False, scaling_config=None, max_position_embeddings=64
    )
    angle = (np.arange(3) + 5)[:, None] * 100.0 ** (-np.arange(4) / 4)
    left, right = x[..., :4], x[..., 4:]
    expected = np.concatenate(
        [
            left * np.cos(angle) - right * np.sin(angle),
            right * np.cos(angle) + left * np.sin(angle),
        ],
        axis=-1,
    )
    assert np.allclose(np.array(rope(mx.array(x), offset=5)), expected, atol=1e-5)
    scaling = {"type": "yarn", "rope_type": "yarn", "factor": 4.0}
    scaling["original_max_position_embeddings"] = 16
    yarn = initialize_rope(
        8, base=100.0, traditional=False, scaling_config=scaling, max_position_embeddings=64
    )
    assert yarn(mx.array(x), offset=5).shape == x.shape


def test_classes_are_found_from_a_config() -> None:
    model_class, args_class = _get_classes({"model_type": "mistral"})
    assert model_class.__module__ == "mlx_lm.models.llama"
    config = models.FAMILIES["mistral"].config
    assert text_model(model_class(args_class.from_dict(config))).args.hidden_size == models.HIDDEN
    with pytest.raises(ValueError, match="not supported"):
        _get_classes({"model_type": "no_such_model"})


def write_model(folder: Path, name: str) -> nn.Module:
    model = models.stock(name)
    config = models.FAMILIES[name].config
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return model


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3"])
def test_load_model_reads_a_folder(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, name)
    loaded, config = load_model(tmp_path, lazy=True)
    assert config["model_type"] == name
    before, after = (dict(tree_flatten(m.parameters())) for m in (model, loaded))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[k], after[k]) for k in before)
    # Arrays beside submodules are not counted: near enough for telling small from large.
    total = sum(v.size for v in before.values())
    assert 0.99 * total <= get_total_parameters(loaded) <= total


def test_dequantize_model_gives_a_plain_model() -> None:
    model = models.new(models.FAMILIES["qwen3"], intermediate_size=64)
    nn.quantize(model, group_size=32, bits=8)
    assert any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters()))
    plain = dequantize_model(model)
    assert not any(name.endswith(".scales") for name, _ in tree_flatten(plain.parameters()))


def test_cast_predicate_keeps_the_decays() -> None:
    predicate = text_model(models.stock("qwen3_5")).cast_predicate
    assert not predicate("model.layers.0.linear_attn.A_log")
    assert predicate("model.layers.0.linear_attn.dt_bias")


# --- generation -------------------------------------------------------------------------------


def test_generate_step_takes_what_we_give_and_yields_token_and_log_probabilities() -> None:
    prompts: list[int] = []

    def look(tokens: mx.array, logits: mx.array) -> mx.array:
        prompts.append(tokens.size)
        return logits

    model = models.stock("qwen3")
    stream = mx.default_stream(mx.cpu)
    steps = list(
        generate_step(
            mx.array([1, 2, 3]), model, stream=stream, max_tokens=2, logits_processors=[look]
        )
    )
    assert prompts[0] == 3
    for token, logprobs in steps:
        assert isinstance(token, int)
        assert logprobs.shape == (models.VOCAB,)
        assert token == mx.argmax(logprobs).item()
        assert abs(mx.exp(logprobs).sum().item() - 1) < 1e-5
    logits = model(mx.array([[1, 2, 3]]))[:, -1]
    ours = (logits - mx.logsumexp(logits, keepdims=True)).squeeze(0)
    assert mx.array_equal(ours, steps[0][1])


def test_filters_serve_any_number_of_rows_alike() -> None:
    logits = mx.random.normal((2, 3, 7), key=mx.random.key(1)) * 2
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for name, value in ((apply_top_p, 0.7), (apply_min_p, 0.2), (apply_top_k, 3)):
        together = name(logprobs, value)
        for i, j in np.ndindex(2, 3):
            assert mx.array_equal(name(logprobs[i : i + 1, j], value)[0], together[i, j])
        kept = np.isfinite(np.array(together)).sum(-1)
        assert (kept >= 1).all()
        assert (kept < 7).any()


def test_processors_take_tokens_and_logits_and_come_in_this_order() -> None:
    """bias, repetition, presence, frequency; sizes count the last tokens, 0 is all of them."""
    processors = make_logits_processors(
        logit_bias={0: 2.0},
        repetition_penalty=2.0,
        repetition_context_size=1,
        presence_penalty=0.5,
        presence_context_size=2,
        frequency_penalty=0.25,
        frequency_context_size=0,
    )
    logits = mx.array([[1.0, -1.0, 1.0, 1.0]])
    seen = []
    for processor in processors:
        logits = processor(mx.array([1, 1, 2, 0]), logits)
        seen.append(logits.tolist()[0])
    assert seen == [
        [3.0, -1.0, 1.0, 1.0],
        [1.5, -1.0, 1.0, 1.0],
        [1.0, -1.0, 0.5, 1.0],
        [0.75, -1.5, 0.25, 1.0],
    ]


def test_generation_response_has_the_fields_that_we_fill() -> None:
    fields = {field.name for field in dataclasses.fields(GenerationResponse)}
    assert fields == {
        "text", "token", "logprobs", "from_draft", "prompt_tokens", "prompt_tps",
        "generation_tokens", "generation_tps", "peak_memory", "finish_reason",
    }  # fmt: skip


def test_wired_limit_is_a_context_over_a_model() -> None:
    with wired_limit(models.stock("qwen3")):
        pass


def test_tokenizer_loads_from_a_folder() -> None:
    tokenizer = tokenizer_utils.load(TOKENIZER, eos_token_ids=[3])
    assert isinstance(tokenizer, TokenizerWrapper)
    assert 3 in tokenizer.eos_token_ids
    ids = tokenizer.encode("def f(x):\n    return x", add_special_tokens=False)
    first, second = tokenizer.detokenizer, tokenizer.detokenizer
    assert first is not second, "a detokenizer of one's own for every text"
    text = ""
    for token in ids:
        first.add_token(token)
        text += first.last_segment
    first.finalize()
    assert text + first.last_segment == "def f(x):\n    return x"
    assert isinstance(tokenizer.has_chat_template, bool)
    wrapped: Any = TokenizerWrapper(tokenizer._tokenizer)
    assert wrapped.encode("x") == tokenizer.encode("x")


# --- what single modules rely on --------------------------------------------------------------


def test_the_stream_that_the_benchmark_times() -> None:
    parameters = inspect.signature(mlx_lm.stream_generate).parameters
    assert list(parameters)[:4] == ["model", "tokenizer", "prompt", "max_tokens"]


def test_remapped_model_types_are_modules() -> None:
    assert MODEL_REMAPPING["mistral"] == "llama"
    for module in MODEL_REMAPPING.values():
        assert importlib.util.find_spec(f"mlx_lm.models.{module}") is not None, module


def test_a_qwen3_is_made_of_a_config() -> None:
    config = {
        "model_type": "qwen3", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6,
        "vocab_size": 8, "max_position_embeddings": 16, "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }  # fmt: skip
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    assert model(mx.array([[1, 2]])).shape == (1, 2, 8)
