"""Quantized targets as mlx-lm writes and loads them: greedy speculation, taps and recorded tapes
are bit-equal to plain mlx-lm on the packed weights."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

import draftloom
from draftloom import ModelError
from tests.support import kv, models, pipelines
from tests.support.drafters import ScriptedDrafter
from tests.support.oracle import Trace, trace

PROMPT = (5, 3, 8, 1, 20, 7, 11, 2)
NEW_TOKENS = 18
TAPS = (0, 2)
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "moe_intermediate_size": 64}
MODES = {
    "2-bit": ("affine", 32, 2),
    "3-bit": ("affine", 32, 3),
    "4-bit": ("affine", 64, 4),
    "5-bit": ("affine", 32, 5),
    "6-bit": ("affine", 32, 6),
    "8-bit": ("affine", 64, 8),
    "mxfp4": ("mxfp4", 32, 4),
    "mxfp8": ("mxfp8", 32, 8),
    "nvfp4": ("nvfp4", 16, 4),
    "mixed": ("affine", 32, 4),
}


def mixed(path: str, module: nn.Module) -> bool | dict[str, Any]:
    """Every layer otherwise: 8 bits, another group size, mxfp4, none at all."""
    if "down_proj" in path or "embed_tokens" in path:
        return {"group_size": 64, "bits": 8, "mode": "affine"}
    if "o_proj" in path or "out_proj" in path:
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    return "q_proj" not in path and "in_proj_z" not in path


def write(folder: Path, family: str, mode: str, **more: Any) -> Path:
    """Quantize a tiny model with mlx-lm's own functions and save it."""
    known = models.FAMILIES[family]
    config = known.config | SIZES
    name, group_size, bits = MODES[mode]
    predicate = mixed if mode == "mixed" else None
    with contextlib.redirect_stdout(io.StringIO()):
        model, written = quantize_model(
            models.new(known, **SIZES), config, group_size, bits, name,
            quant_predicate=predicate, **more,
        )  # fmt: skip
    save_model(folder, model, donate_model=False)
    save_config(written, folder / "config.json")
    return folder


def packed_layers(model: nn.Module) -> int:
    return sum(name.endswith(".scales") for name, _ in tree_flatten(model.parameters()))


def own_trace(folder: Path, count: int) -> Trace:
    """Greedy text, logits, layer outputs and caches of plain mlx-lm."""
    plain, _ = load_model(folder)
    text, _ = kv.plain(plain, PROMPT, count, None)
    return trace(plain, [[*PROMPT, *text]])


@pytest.fixture
def target(tmp_path: Path) -> Callable[..., Path]:
    return lambda family, mode, **more: write(tmp_path / f"{family}-{mode}", family, mode, **more)


@pytest.mark.parametrize(
    ("family", "mode"),
    [("qwen3_5-v2", mode) for mode in MODES]
    + [(f, m) for f in ("qwen3", "qwen3_5_moe", "qwen3_next") for m in ("4-bit", "nvfp4", "mixed")],
)
def test_speculation_over_packed_weights(
    target: Callable[..., Path], family: str, mode: str
) -> None:
    """Tokens, features and caches after every cycle, drafts being right, half right and wrong."""
    folder = target(family, mode)
    expected = own_trace(folder, NEW_TOKENS + 16)
    builder = draftloom.PipelineBuilder(folder, plugins=pipelines.plugins()).dtype("stored")
    builder = builder.block_size(6).drafter(
        "test.scripted", text=expected.tokens, vocab_size=models.VOCAB, mode="mixed", taps=TAPS
    )
    with builder.build() as pipeline:
        assert packed_layers(pipeline.model) > 8
        drafter = pipeline._parts.drafter
        assert isinstance(drafter, ScriptedDrafter)
        engine = pipeline.engine(PROMPT, draftloom.GenerateOptions(max_tokens=NEW_TOKENS))
        count = len(PROMPT)
        for event in engine.cycles():
            assert event.token_ids == expected.tokens[count : count + len(event.token_ids)]
            count += len(event.token_ids)
            assert not expected.differences(engine.cache, count - 1)
        assert drafter.session is not None
        shown = np.concatenate(
            [np.array(f.astype(mx.float32))[0] for f in drafter.session.features]
        )
        assert np.array_equal(shown, expected.taps(TAPS, len(shown)))
        assert engine.stats.accepted
        assert not engine.stats.fell_back


def test_settings_of_single_layers_are_those_of_the_file(target: Callable[..., Path]) -> None:
    with draftloom.load(target("qwen3_5-v2", "mixed"), "none", dtype="stored") as pipeline:
        modules = dict(pipeline.model.named_modules())
        named = {name.rpartition(".")[2]: m for name, m in modules.items() if "layers" in name}
        assert (named["down_proj"].bits, named["down_proj"].group_size) == (8, 64)
        assert named["out_proj"].mode == named["o_proj"].mode == "mxfp4"
        assert (named["k_proj"].bits, named["k_proj"].group_size) == (4, 32)
        assert type(named["q_proj"]) is type(named["in_proj_z"]) is nn.Linear


@pytest.mark.parametrize("mode", ["4-bit", "mxfp4", "nvfp4", "mixed"])
def test_a_small_model_is_unpacked_by_default(target: Callable[..., Path], mode: str) -> None:
    """To the very numbers that its packed weights stand for, in float32 on the CPU."""
    folder = target("qwen3_5-v2", mode)
    packed, _ = load_model(folder)
    with draftloom.load(folder, "prompt-lookup") as pipeline:
        assert packed_layers(pipeline.model) == 0
        plain = dict(tree_flatten(pipeline.model.parameters()))
        assert {value.dtype for value in plain.values()} == {mx.float32}
        result = pipeline.generate(PROMPT, max_tokens=8)
    modules = dict(packed.named_modules())
    some = modules["language_model.model.layers.1.self_attn.k_proj"]
    wanted = mx.dequantize(
        some.weight, some.scales, some.get("biases"), some.group_size, some.bits, some.mode
    )
    ours = next(v for n, v in plain.items() if n.endswith("layers.1.self_attn.k_proj.weight"))
    assert mx.array_equal(ours, wanted.astype(mx.float32))
    assert len(result.token_ids) == 8


def test_a_drafter_reads_features_of_packed_layers(
    target: Callable[..., Path], tmp_path: Path
) -> None:
    """DFlash takes the packed target's embeddings and head."""
    folder = target("qwen3_5-tied", "4-bit")
    checkpoint = pipelines.dflash_checkpoint(
        tmp_path / "dflash", hidden=64, vocab=models.VOCAB, taps=TAPS, block_size=8
    )
    expected = own_trace(folder, NEW_TOKENS).tokens[len(PROMPT) :]
    builder = draftloom.PipelineBuilder(folder).dtype("stored").drafter(str(checkpoint)).own_width()
    with builder.build() as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=NEW_TOKENS)
    assert result.token_ids == expected
    assert result.stats.drafted
    assert not result.stats.fell_back


# --- what this device cannot ------------------------------------------------------------------


def test_a_global_scale_needs_a_gpu(target: Callable[..., Path]) -> None:
    folder = target("qwen3_5_moe", "nvfp4", global_scale=True)
    with pytest.raises(ModelError) as caught:
        draftloom.load(folder, "none")
    assert "nvfp4 weights with a global scale" in caught.value.message
    assert "GPU only" in caught.value.message
    assert "another quantization" in caught.value.hint


def test_quantized_activations_need_a_gpu(tmp_path: Path) -> None:
    folder = write(tmp_path / "target", "qwen3", "nvfp4")
    config = draftloom.ModelInfo.from_path(folder).config
    save_config({**config, "quantize_activations": True}, folder / "config.json")
    with pytest.raises(ModelError, match=r"quantizes activations .* GPU only"):
        draftloom.load(folder, "none")


def test_a_byte_that_is_no_scale(tmp_path: Path) -> None:
    folder = write(tmp_path / "target", "qwen3", "mxfp4")
    file = folder / "model.safetensors"
    loaded: Any = mx.load(str(file))
    held = {k: mx.array(v) for k, v in loaded.items()}
    mx.eval(held)
    name = "model.layers.1.mlp.up_proj.scales"
    held[name][0, 0] = 255
    mx.save_safetensors(str(file), held)
    with pytest.raises(ModelError, match=f"{re.escape(name)} holds numbers that are not finite"):
        draftloom.load(folder, "none", dtype="stored")
