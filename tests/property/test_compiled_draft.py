"""A drafter's pass that is traced once and replayed: the same hidden states, the same text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from draftloom.drafters.dflash.compiled import CompiledBlock, compiled_block
from draftloom.kernel_settings import KernelSettings
from tests.support import cases, models, pipelines
from tests.support.cases import Case
from tests.support.drafts_ahead import CYCLES, disagreements
from tests.support.oracle import greedy_trace

ON = {"compiled-draft": "on"}
PROMPT = tuple(i * 7 % models.VOCAB for i in range(1, 9))
LAYERS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        "use_sliding_window": True,
    },
}


def checkpoint(folder: Path, **config: Any) -> Path:
    return pipelines.dflash_checkpoint(
        folder / "dflash", hidden=models.HIDDEN, vocab=models.VOCAB, taps=(0, 2), **config
    )


def compiled_of(pipeline: Any) -> CompiledBlock | None:
    found: CompiledBlock | None = pipeline._parts.drafter._loaded.compiled
    return found


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_hidden_states(kind: str, window: int | None, tmp_path: Path) -> None:
    """Over a context that grows past its window and past an allocation; the kept rows too."""
    options: dict[str, Any] = {} if window is None else {"window": window, "sinks": 3}
    folder = checkpoint(tmp_path, **LAYERS[kind])
    builder = pipelines.builder(models.build("qwen3")).drafter(
        "dflash", checkpoint=str(folder), **options
    )
    with builder.kernels(ON).build() as pipeline:
        network, compiled = pipeline._parts.drafter._loaded.network, compiled_of(pipeline)
        assert compiled is not None
        size = pipeline._parts.drafter._options.window
        ours, plain = network.make_cache(size), network.make_cache(size)
        key, wrong = mx.random.key(1), 0.0
        for step in range(40):
            key, one, two = mx.random.split(key, 3)
            features = mx.random.normal((1, 1 + step % 5 * 4, 2 * models.HIDDEN), key=one)
            embeddings = mx.random.normal((1, 4, models.HIDDEN), key=two)
            for cache in (ours, plain):
                network.extend(features, cache)
            rows = slice(1, 4 - step % 2)
            found = compiled.run(embeddings, ours, rows)
            expected = network(embeddings, plain, rows)
            assert found is not None
            assert found.shape == expected.shape
            wrong = max(wrong, float(mx.abs(found - expected).max()))
        for one, other in zip(ours, plain, strict=True):
            assert one.offset == other.offset > 256
            for a, b in zip(one.arrays, other.arrays, strict=True):
                kept = np.array(b[..., : other.held, :])
                assert np.array_equal(np.array(a[..., : one.held, :]), kept)
        assert compiled.replayed == 40
        assert compiled.traced <= 8
    assert wrong < 1e-5


@pytest.mark.parametrize("how", ["on", "ahead"])
@pytest.mark.parametrize("drafter", ["dflash", "dspark", "cascade"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_text_and_caches(family: str, drafter: str, how: str, tmp_path: Path) -> None:
    kernels = (("compiled-draft", how), ("compiled-pass", "on"))
    one = Case(family, drafter, "auto", "block", 6, PROMPT, kernels=kernels)
    assert cases.run(one, tmp_path) > 2


def test_drafts_are_compiled_in_a_pipeline(tmp_path: Path) -> None:
    expected = greedy_trace("qwen3", PROMPT, 24).tokens[len(PROMPT) :][:24]
    builder = pipelines.builder(models.build("qwen3")).width(5)
    builder = builder.drafter("dflash", checkpoint=str(checkpoint(tmp_path))).kernels(ON)
    with builder.build() as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=24)
        compiled = compiled_of(pipeline)
        assert compiled is not None
        assert result.token_ids == expected
        assert compiled.replayed > 10 > compiled.traced
        assert not result.stats.fell_back


@pytest.mark.parametrize("packed", ["off", "packed"])
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_drafts_made_ahead_are_those_made_after(
    kind: str, window: int | None, packed: str, tmp_path: Path
) -> None:
    """Whatever is kept of the block, and where the context's window fills on the way."""
    options: dict[str, Any] = {} if window is None else {"window": window, "sinks": 3}
    wrong, made = disagreements(tmp_path, {"packed-drafter": packed}, options, **LAYERS[kind])
    assert wrong == []
    least = {("full", None): CYCLES - 1, ("full", 60): 10}.get((kind, window), 0)
    assert least <= made < CYCLES, "an empty context cannot be gone on from"


def test_offsets_on_the_device_have_no_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX-CUDA reads an offset with an axis as one for each row, whatever its length."""
    seen: list[Any] = []
    rope = mx.fast.rope

    def spy(*args: Any, offset: Any, **kwargs: Any) -> mx.array:
        seen.append(offset)
        return rope(*args, offset=offset, **kwargs)

    monkeypatch.setattr(mx.fast, "rope", spy)
    wrong, _ = disagreements(tmp_path, {"packed-drafter": "packed", "compiled-pass": "on"}, {})
    folder = checkpoint(tmp_path)
    builder = pipelines.builder(models.build("qwen3")).width(5).kernels({"compiled-pass": "on"})
    with builder.drafter("dflash", checkpoint=str(folder)).build() as pipeline:
        pipeline.generate(PROMPT, max_tokens=12)
    arrays = [offset for offset in seen if isinstance(offset, mx.array)]
    assert wrong == []
    assert len(arrays) > 20
    assert {offset.ndim for offset in arrays} == {0}


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 17, 60])
def test_a_text_with_drafts_launched_ahead(limit: int, tmp_path: Path) -> None:
    expected = greedy_trace("qwen3", PROMPT, limit).tokens[len(PROMPT) :][:limit]
    builder = pipelines.builder(models.build("qwen3"))
    builder = builder.drafter("dflash", checkpoint=str(checkpoint(tmp_path))).width(5)
    found = []
    for how in ("on", "ahead"):
        with builder.kernels({"compiled-draft": how}).build() as pipeline:
            result = pipeline.generate(PROMPT, max_tokens=limit)
            assert result.token_ids == expected
            assert not result.stats.fell_back
            found.append((result.stats.accepted, result.stats.verified, result.stats.cycles))
    assert found[0] == found[1]


def test_a_failure_while_tracing_leaves_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = pipelines.builder(models.build("qwen3"))
    builder = builder.drafter("dflash", checkpoint=str(checkpoint(tmp_path))).kernels(ON)
    with builder.build() as pipeline:
        network, compiled = pipeline._parts.drafter._loaded.network, compiled_of(pipeline)
        assert compiled is not None
        cache = network.make_cache()
        network.extend(mx.ones((1, 3, 2 * models.HIDDEN)), cache)
        before = [np.array(a[..., : e.held, :]) for e in cache for a in e.arrays]

        class Broken:
            def __call__(self, *given: Any) -> mx.array:
                network(*given)
                raise RuntimeError("no such kernel")

        monkeypatch.setattr(compiled, "_network", Broken())
        with pytest.raises(RuntimeError, match="no such kernel"):
            compiled.run(mx.ones((1, 4, models.HIDDEN)), cache, slice(1, 4))
        after = [np.array(a[..., : e.held, :]) for e in cache for a in e.arrays]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_cannot_be_compiled_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class OnTheHost(nn.Module):
        def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
            return x * int(offset)

    builder = pipelines.builder(models.build("qwen3"))
    builder = builder.drafter("dflash", checkpoint=str(checkpoint(tmp_path)))
    with builder.build() as pipeline:
        network = pipeline._parts.drafter._loaded.network
        described = pipeline._parts.drafter.description
        assert compiled_of(pipeline) is None, "off by default"
        assert compiled_block(network, described, KernelSettings.of(ON)) is not None
        network.layers[1].self_attn.rope = OnTheHost()
        with caplog.at_level(logging.WARNING, "draftloom.kernels"):
            assert compiled_block(network, described, KernelSettings.of(ON)) is None
    assert "drafts run as they are" in caplog.text
