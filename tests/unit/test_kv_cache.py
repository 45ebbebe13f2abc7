"""Settings of quantized caches: what is refused, before weights are loaded; mlx-lm's arguments."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

import draftloom
from draftloom import GraphError, KVQuantization, ModelInfo, PipelineSpec, UsageError
from draftloom.adapters.quantized_kv import why_not_quantized_kv
from draftloom.kv_conversion import KVConversion
from draftloom.pipeline import GenerateOptions
from tests.support import families_more, kv, models, pipelines

PROMPT = (5, 3, 8, 1, 20, 7, 11, 2)

# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kv_bits": 7}, "kv_bits cannot be 7"),
        ({"kv_bits": True}, "kv_bits cannot be True"),
        ({"kv_bits": 8, "kv_group_size": 48}, "kv_group_size cannot be 48"),
        ({"kv_bits": 8, "quantized_kv_start": -1}, "quantized_kv_start must be 0 or more"),
    ],
)
def test_values_that_mlx_lm_does_not_take(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        KVQuantization(**values)


def test_a_pipeline_file_has_them() -> None:
    spec = PipelineSpec.from_toml("kv_cache = { kv_bits = 4, quantized_kv_start = 9 }")
    assert spec.kv_cache == KVQuantization(4, 64, 9)
    assert "kv_cache = { kv_bits = 4, quantized_kv_start = 9 }" in spec.to_toml()
    for text, words in {
        "kv_cache = 4": "expected a table",
        "kv_cache = { kv_bit = 4 }": "did you mean 'kv_bits'",
        "kv_cache = { kv_group_size = 64 }": "needs kv_bits",
        "kv_cache = { kv_bits = 9 }": "cannot be 9",
    }.items():
        with pytest.raises(GraphError, match=words):
            PipelineSpec.from_toml(text)


def test_a_graph_says_so() -> None:
    builder = pipelines.builder(kv.build("qwen3")).drafter("none").kv_cache(4, 32, 0)
    with builder.build() as pipeline:
        assert "4 bits in groups of 32, from token 0 on" in pipeline.describe()
    assert builder.kv_cache(None).spec.kv_cache is None


# --- families ---------------------------------------------------------------------------------

_WIDE_MLA = {"kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}


def _config(name: str, **changes: Any) -> ModelInfo:
    known = (
        models.FAMILIES
        | families_more.MORE
        | families_more.GENERIC
        | families_more.RECURRENT
        | families_more.RECURRENT
    )
    return ModelInfo(name, None, {**known[name].config, **changes})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_config("qwen3", head_dim=32), ""),
        (_config("qwen3_5", head_dim=32), ""),
        (_config("qwen3", head_dim=24), "does not divide its head size 24, no group size does"),
        (_config("qwen3", head_dim=96), "does not divide its head size 96, kv_group_size 32 does"),
        (_config("gemma3_text"), "sliding-window caches"),
        (_config("llama-sliding", head_dim=32), "sliding-window caches"),
        (_config("gpt_oss", head_dim=64), "sliding-window caches"),
        (_config("deepseek_v3", **_WIDE_MLA), "its attention does not take them"),
        (_config("mamba2"), "no cache that mlx-lm packs"),
    ],
    ids=lambda value: value.name if isinstance(value, ModelInfo) else None,
)
def test_families_that_cannot(model: ModelInfo, words: str) -> None:
    size = 32 if model.config.get("head_dim") == 32 or model.name == "deepseek_v3" else 64
    reason = why_not_quantized_kv(model, KVQuantization(8, size))
    assert words in reason
    assert bool(reason) == bool(words)
    assert "\n" not in reason


def test_refused_in_one_line_before_anything_runs() -> None:
    model = models.new(models.SLIDING)
    builder = pipelines.builder(model).drafter("none").kv_cache(8)
    with pytest.raises(GraphError) as caught:
        builder.check()
    (problem,) = caught.value.problems
    assert "cannot run on quantized caches: mlx-lm cannot pack its sliding-window" in str(problem)


class _Silent:
    """An adapter's class that says nothing of packed caches."""

    @classmethod
    def claims(cls, model: ModelInfo) -> bool:
        return True

    @classmethod
    def describe(cls, model: ModelInfo) -> draftloom.TargetInfo:
        from draftloom.adapters.attention import AttentionAdapter

        return AttentionAdapter.describe(model)


class _Plugin:
    @draftloom.hookimpl
    def register_target_adapters(self, register: draftloom.Register) -> None:
        register("lab.silent", _Silent)


def test_an_adapter_that_does_not_say_is_refused() -> None:
    plugins = draftloom.PluginManager(entry_points=False, extra=[_Plugin()])
    builder = draftloom.PipelineBuilder(plugins=plugins).model(kv.build("qwen3")).drafter("none")
    with pytest.raises(GraphError, match=r"'lab\.silent' does not say"):
        builder.kv_cache(8).check()


# --- the moment of conversion -----------------------------------------------------------------


def _filled(tokens: int) -> list[Any]:
    cache = make_prompt_cache(kv.stock("qwen3_5-v2"))
    if tokens:
        kv.stock("qwen3_5-v2")(mx.zeros((1, tokens), dtype=mx.int32), cache=cache)
    return cache


@pytest.mark.parametrize(("tokens", "room"), [(0, 8), (3, 5), (8, 0), (9, 2**31), (30, 2**31)])
def test_a_block_ends_before_the_conversion(tokens: int, room: int) -> None:
    assert KVConversion(KVQuantization(8, 32, 9), _filled(tokens)).room == room
    assert KVConversion(None, _filled(tokens)).room == 2**31


def test_the_first_pass_runs_on_what_it_is_given() -> None:
    cache = _filled(12)
    conversion = KVConversion(KVQuantization(8, 32, 9), cache)
    conversion.settle()
    conversion.before_pass()
    assert not any(isinstance(entry, QuantizedKVCache) for entry in cache)
    conversion.before_pass()
    assert sum(isinstance(entry, QuantizedKVCache) for entry in cache) == 2
    assert not any(isinstance(entry, KVCache) for entry in cache)


def test_a_given_cache_that_cannot_be_packed() -> None:
    with pytest.raises(UsageError, match="sliding-window cache cannot be quantized"):
        KVConversion(KVQuantization(8), [RotatingKVCache(8)])


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3"])
def test_a_text_over_caches_that_are_given(family: str) -> None:
    """Twice over the same caches: plain ones, then packed ones."""
    settings = KVQuantization(4, 32, 10)
    theirs = make_prompt_cache(kv.stock(family))
    first, _ = kv.plain(kv.stock(family), PROMPT, 6, settings, cache=theirs)
    second, _ = kv.plain(kv.stock(family), (4, 9), 6, settings, cache=theirs)
    builder = pipelines.builder(kv.build(family)).kv_cache(4, 32, 10).drafter("prompt-lookup")
    with builder.build() as pipeline:
        ours = pipeline._parts.target.make_cache()
        for prompt, expected in ((PROMPT, first), ((4, 9), second)):
            engine = pipeline.engine(prompt, GenerateOptions(max_tokens=6, cache=ours))
            assert [t for event in engine.cycles() for t in event.token_ids] == expected
            engine.absorb_last()
    assert not kv.differences(ours, theirs)


def test_a_cut_inside_the_last_block_before_a_conversion() -> None:
    """The block filled the cache up to the conversion: it is cut, and not packed."""
    text, _ = kv.plain(kv.stock("qwen3"), PROMPT, 30, KVQuantization(4, 32, 14))
    builder = pipelines.builder(kv.build("qwen3")).kv_cache(4, 32, 14).block_size(6)
    builder = builder.drafter("test.scripted", text=(*PROMPT, *text), vocab_size=models.VOCAB)
    with builder.build() as pipeline:
        engine = pipeline.engine(PROMPT, GenerateOptions(max_tokens=30))
        for event in engine.cycles():
            if event.index == 1:
                assert len(event.token_ids) == 6
                engine.cut(2)
                break
        engine.finish()
    _, expected = kv.plain(kv.stock("qwen3"), PROMPT, 2, KVQuantization(4, 32, 14))
    assert [entry.offset for entry in engine.cache] == [e.offset for e in expected]
    assert not kv.differences(engine.cache, expected)


# --- mlx-lm's arguments -----------------------------------------------------------------------


@pytest.fixture
def tokenizer() -> Any:
    from draftloom.adapters.bundled import default_pair

    return mlx_lm.tokenizer_utils.load(default_pair().target)


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3"])
def test_stream_generate_takes_mlx_lms_arguments(family: str, tokenizer: Any) -> None:
    options: dict[str, Any] = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 10}

    def tokens(run: Any, model: Any, **more: Any) -> list[int]:
        return [r.token for r in run(model, tokenizer, list(PROMPT), max_tokens=16, **more)]

    theirs = tokens(mlx_lm.stream_generate, kv.stock(family), **options)
    assert tokens(draftloom.stream_generate, kv.build(family), **options) == theirs
    nothing = {**options, "kv_bits": None}
    plain = tokens(mlx_lm.stream_generate, kv.stock(family))
    assert tokens(draftloom.stream_generate, kv.build(family), **nothing) == plain
