"""What takes memory, counted before it is taken; what was held, said afterwards."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import draftloom
from draftloom import GraphError, ModelInfo, PipelineSpec, UsageError
from draftloom.adapters.base import sketch
from draftloom.adapters.bundled import default_pair
from draftloom.device import default_limit, device_memory
from draftloom.kv_cache import KVQuantization
from draftloom.memory import (
    MemorySettings,
    WorkShape,
    cache_bytes,
    cache_costs,
    module_bytes,
    size_text,
)
from draftloom.pipeline import GenerateOptions
from tests.parity.test_quantized_targets import write as write_quantized
from tests.support import families_more, kv, models, pipelines

PROMPT = tuple(range(1, 21))
TAPS = (0, 2)

# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"limit_gb": 0},
        {"limit_gb": -1.5},
        {"limit_gb": True},
        {"limit_gb": float("nan")},
        {"context_length": 0},
        {"prefill_step_size": 0},
        {"prefill_step_size": 2.5},
    ],
)
def test_settings_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))) as caught:
        MemorySettings(**values)
    assert caught.value.hint


def test_a_pipeline_file_has_them() -> None:
    text = "memory = { limit_gb = 1.5, context_length = 4096, prefill_step_size = 64 }"
    spec = PipelineSpec.from_toml(text)
    assert spec.memory == MemorySettings(1.5, 4096, 64)
    assert PipelineSpec.from_toml(spec.to_toml()) == spec
    assert "memory" not in PipelineSpec().to_toml()
    with pytest.raises(GraphError, match="did you mean 'limit_gb'"):
        PipelineSpec.from_toml("memory = { limit = 1 }")
    assert MemorySettings(1.5).limit == 1_500_000_000
    assert draftloom.PipelineBuilder().memory(1.5, 4096, 64).spec.memory == spec.memory


def test_the_default_limit_is_what_the_host_has_to_spare() -> None:
    memory, limit = device_memory(), default_limit()
    assert memory is not None
    assert limit is not None
    assert 2**20 < limit <= memory
    assert MemorySettings().limit is not None


def test_sizes_in_words() -> None:
    assert [size_text(n) for n in (999, 1500, 2_400_000, 3_210_000_000)] == [
        "999 bytes", "1.5 kB", "2.4 MB", "3.2 GB",
    ]  # fmt: skip


# --- caches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3", "llama-tied", "qwen3_next"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_caches_take_what_is_counted(family: str, bits: int | None) -> None:
    """One token, run and never computed, against caches that were filled."""
    model = kv.build(family) if family in kv.FAMILIES else models.build(family)
    if bits is not None and family not in kv.FAMILIES:
        model = models.new(models.FAMILIES[family], head_dim=32)
    settings = None if bits is None else KVQuantization(bits, 32, 0)
    with pipelines.adapter(model) as target:
        costs, itemsize = cache_costs(target.forward, target.make_cache(), settings)
    assert itemsize == 4
    for tokens in (2, 256, 257):
        prompt = [1] * (tokens - 1)
        _, cache = kv.plain(model, prompt, 1, settings)
        assert sum(cost.at(tokens) for cost in costs) == sum(map(cache_bytes, cache)), tokens


def test_caches_of_other_kinds() -> None:
    for name in ("falcon_h1", "mamba2", "rwkv7", "kimi_linear"):
        known = families_more.GENERIC | families_more.RECURRENT
        info = ModelInfo(name, None, known[name].config)
        costs, _ = cache_costs(*sketch(info, mx.float32), None)
        assert sum(cost.at(300) for cost in costs) > 0
        grows = sum(c.at(3000) for c in costs) > sum(c.at(300) for c in costs)
        assert grows == (name not in ("mamba2", "rwkv7"))
    window = models.SLIDING
    costs, _ = cache_costs(*sketch(ModelInfo("w", None, window.config), mx.float32), None)
    assert [cost.most for cost in costs] == [8, None, 8]
    assert costs[0].at(8) == costs[0].at(5000)


def test_a_sketch_computes_in_the_type_that_is_asked_for() -> None:
    info = ModelInfo("x", None, models.FAMILIES["qwen3_5"].config)
    sizes = {}
    for dtype in (mx.float32, mx.bfloat16):
        costs, itemsize = cache_costs(*sketch(info, dtype), None)
        assert itemsize == dtype.size
        sizes[itemsize] = [cost.per_token for cost in costs]
    assert sizes[4] == [2 * size for size in sizes[2]]


# --- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "stored", "float32", "bfloat16"])
def test_weights_take_what_is_counted(tmp_path: Path, dtype: str) -> None:
    folders = [write_quantized(tmp_path / m, "qwen3_5-v2", m) for m in ("4-bit", "mixed", "nvfp4")]
    for folder in (*folders, default_pair().target):
        info = ModelInfo.from_path(folder)
        found = pipelines.plugins().estimate_weights(info, dtype)
        assert found is not None
        loaded = pipelines.plugins().load_model(info, dtype)
        assert abs(found.size / module_bytes(loaded.model) - 1) < 0.01, folder
        if dtype in ("float32", "bfloat16"):
            assert found.dtype == getattr(mx, dtype)


def test_weights_that_are_not_downloaded_yet(tmp_path: Path) -> None:
    config = models.FAMILIES["qwen3"].config
    (tmp_path / "config.json").write_text(json.dumps(config))
    info = ModelInfo.from_path(tmp_path)
    assert pipelines.plugins().estimate_weights(info, "auto") is None
    index = {"metadata": {"total_size": 18_000_000_000}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = pipelines.plugins().estimate_weights(info, "auto")
    assert found is not None
    assert found.size == 18_000_000_000


def test_an_estimate_without_weights(tmp_path: Path) -> None:
    """The bundled pair: every part is known, and grows as it should; the drafter's context does no
    longer where it has a window."""
    bounded = draftloom.PipelineBuilder(plugins=pipelines.plugins())
    builder = bounded.drafter("auto", window=0)
    short, long = (builder.memory(context_length=n).memory_estimate() for n in (256, 4096))
    assert short.target_weights == long.target_weights
    assert long.drafter_weights
    assert long.caches is not None
    assert short.caches is not None
    assert long.caches > short.caches
    assert long.drafter_context > 6 * short.drafter_context > 0
    windowed = bounded.memory(context_length=4096).memory_estimate()
    assert 0 < windowed.drafter_context < long.drafter_context / 6
    assert long.total > long.caches + long.drafter_context
    packed = builder.kv_cache(8, 32, 0).memory(context_length=4096).memory_estimate()
    assert packed.caches is not None
    assert packed.caches < long.caches
    assert set(long.as_dict()) >= {"unit", "total", "limit", "prefill"}


def test_scores_are_counted_where_attention_writes_them() -> None:
    info = ModelInfo("x", None, {"model_type": "x", "num_attention_heads": 8, "head_dim": 64})
    work = WorkShape.of(info, 512, 0, 4, packed=False)
    assert work.whole_scores
    assert work.at(512, 4096) - work.at(512, 2048) == 3 * 4 * 8 * 512 * 2048


# --- what was held ----------------------------------------------------------------------------


def test_a_generation_says_what_it_held(tmp_path: Path) -> None:
    checkpoint = pipelines.dflash_checkpoint(
        tmp_path / "dflash", hidden=models.HIDDEN, vocab=models.VOCAB, taps=TAPS, block_size=8
    )
    model = models.build("qwen3_5-v2")
    builder = pipelines.builder(model).drafter("dflash", checkpoint=str(checkpoint))
    with builder.memory(limit_gb=100, prefill_step_size=7).build() as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=12)
        held = result.stats.memory
        assert held is not None
        assert held.target_weights == sum(v.nbytes for _, v in tree_flatten(model.parameters()))
        stored = load_bytes(checkpoint)
        assert held.drafter_weights == stored
        cache = make_prompt_cache(model)
        model(mx.array([[1]]), cache=cache)
        assert held.kv_caches == sum(cache_bytes(cache[i]) for i in (1, 3))
        assert held.recurrent_states == sum(cache_bytes(cache[i]) for i in (0, 2))
        assert held.drafter_context >= 2 * 2 * 2 * 8 * 4 * 256
        assert held.features == 7 * len(TAPS) * models.HIDDEN * 4
        # two gated-delta layers, 8 tokens: delta 4 x 8, keys 2 x 8, decay 4; 3 + 8 rows of a window
        assert held.tape == 2 * 4 * (8 * (32 + 16 + 4) + (3 + 8) * 64)
        assert held.peak >= held.target_weights
        assert held.limit == 100_000_000_000
        assert held.prefill_step_size == 7
        assert held.shrunk == ()
        data = result.as_dict()["memory"]
        assert data["unit"] == "bytes"
        assert json.loads(json.dumps(data)) == data


def load_bytes(folder: Path) -> int:
    loaded: Any = mx.load(str(folder / "model.safetensors"))
    return sum(value.nbytes for value in loaded.values())


def test_drafters_without_weights_hold_nothing() -> None:
    with pipelines.builder(models.build("qwen3")).drafter("prompt-lookup").build() as pipeline:
        held = pipeline.generate(PROMPT, max_tokens=4).stats.memory
    assert held is not None
    assert (held.drafter_weights, held.drafter_context, held.features, held.tape) == (0, 0, 0, 0)


def test_a_draft_model_and_a_cascade_say_what_they_hold() -> None:
    draft = pipelines.adapt(models.new(models.FAMILIES["qwen3"], 7))
    base = pipelines.builder(models.build("qwen3"))
    lookup = {"use": "prompt-lookup"}
    for builder in (
        base.drafter("autoregressive", model=draft),
        base.drafter("cascade", stages=[lookup, {"use": "autoregressive", "model": draft}]),
    ):
        with builder.build() as pipeline:
            held = pipeline.generate(PROMPT, max_tokens=6).stats.memory
            assert held is not None
            assert held.drafter_weights == module_bytes(draft.model)
            context = pipeline._parts.drafter.context_bytes(30)  # type: ignore[attr-defined]
            ran = held.drafter_context > 0 or pipeline.names["drafter"] != "autoregressive"
            assert ran
            assert held.drafter_context in (0, context)


# --- the prompt -------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "steps"), [(600, 6), (100, 12)])
def test_features_of_one_chunk_are_alive_at_most(tmp_path: Path, chunk: int, steps: int) -> None:
    """Memory in use when a chunk begins, less caches and what the drafter says it holds, does not
    grow. Features of the last layer, which no cache needs, are among them: left uncomputed they
    would keep keys and values of the chunk they come from."""
    model = models.new(models.FAMILIES["qwen3"], max_position_embeddings=8192)
    checkpoint = pipelines.dflash_checkpoint(
        tmp_path / "dflash", hidden=models.HIDDEN, vocab=models.VOCAB, taps=(0, 1, 2)
    )
    rest: list[int] = []
    builder = pipelines.builder(model).drafter("dflash", checkpoint=str(checkpoint))
    with builder.memory(prefill_step_size=chunk).build() as pipeline:
        target = pipeline._parts.target
        forward = target.forward
        prompt = tuple(i % models.VOCAB for i in range(chunk * steps + 1))
        engine = pipeline.engine(prompt, GenerateOptions(max_tokens=1))

        def watched(tokens: mx.array, cache: list[Any]) -> Any:
            mx.synchronize()
            context = engine._drafter.memory()
            rest.append(mx.get_active_memory() - sum(map(cache_bytes, cache)) - context)
            return forward(tokens, cache)

        target.forward = watched  # type: ignore[method-assign]
        assert len(list(engine.cycles())) == 1
    features = chunk * 3 * models.HIDDEN * 4
    assert engine._watch.prefill.features == features
    assert len(rest) == steps + 1
    assert max(rest) - rest[0] < features / 2, rest


def test_kept_features_would_be_noticed() -> None:
    """That the test above can fail: a drafter that keeps what it is shown."""
    model = models.build("qwen3")
    text = tuple(range(24)) * 4
    builder = pipelines.builder(model).drafter(
        "test.scripted", text=text, vocab_size=models.VOCAB, taps=TAPS
    )
    with builder.build() as pipeline:
        engine = pipeline.engine(text[:60], GenerateOptions(max_tokens=1, prefill_chunk=20))
        gc.collect()  # what other tests left would be freed on the way
        mx.synchronize()
        before = mx.get_active_memory()
        list(engine.cycles())
        drafter: Any = pipeline._parts.drafter
        mx.eval(drafter.session.features)
        kept = mx.get_active_memory() - before - sum(map(cache_bytes, engine.cache))
    assert kept >= 59 * len(TAPS) * models.HIDDEN * 4


def test_a_model_that_is_loaded_already_is_counted_as_it_is(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "target", "qwen3", "nvfp4")
    model, _ = load_model(folder)
    with pipelines.builder(model).drafter("none").build() as pipeline:
        held = pipeline.generate(PROMPT, max_tokens=2).stats.memory
    assert held is not None
    assert held.target_weights == module_bytes(model)
