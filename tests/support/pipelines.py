"""Pipelines over tiny models, built as a user builds them, with test components registered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from draftloom import PipelineBuilder
from draftloom.contracts import (
    ComponentInfo,
    Speculation,
    TargetAdapter,
    TargetOutput,
)
from draftloom.hookspecs import Register, hookimpl
from draftloom.model_info import ModelInfo
from draftloom.plugins import PluginManager
from draftloom.verifiers.block import BlockVerifier
from tests.support.drafters import DenseDrafter, FixedDrafter, ScriptedDrafter

__all__ = [
    "FailingVerifier",
    "adapt",
    "adapter",
    "builder",
    "dflash_checkpoint",
    "plugins",
]


class FailingVerifier:
    """The block verifier, which fails after the pass in one of the cycles.

    Args:
        at: number of the call that fails.
        always: fail in every later call too, so that the target cannot go on alone.
    """

    info = ComponentInfo("test.failing", "fails once, or for good")

    def __init__(self, at: int, always: bool = False) -> None:
        self._at, self._always, self._calls = at, always, 0

    def verify(
        self, target: TargetAdapter, block: mx.array, speculation: Speculation
    ) -> TargetOutput:
        """As `BlockVerifier`, or an error after the caches have been written."""
        output = BlockVerifier().verify(target, block, speculation)
        mx.eval(output.logits)
        self._calls += 1
        if self._calls - 1 == self._at or (self._always and self._calls > self._at):
            raise RuntimeError("the device is gone")
        return output


class _Plugin:
    @hookimpl
    def register_drafters(self, register: Register) -> None:
        register("test.scripted", ScriptedDrafter)
        register("test.dense", DenseDrafter)
        register("test.fixed", FixedDrafter)

    @hookimpl
    def register_verifiers(self, register: Register) -> None:
        register("test.failing", FailingVerifier)


@lru_cache(maxsize=1)
def plugins() -> PluginManager:
    """The built-in plugins and the test components."""
    return PluginManager(entry_points=False, extra=[_Plugin()])


def builder(model: nn.Module, tokenizer: Any = None) -> PipelineBuilder:
    """A builder for a loaded model."""
    return PipelineBuilder(plugins=plugins()).model(model, tokenizer).width("fixed")


def adapt(model: nn.Module) -> TargetAdapter:
    """The model under the adapter that claims it."""
    info = ModelInfo.from_model(model)
    factory = plugins().adapter_for(info).load()
    target: TargetAdapter = factory(model, factory.describe(info))
    return target


@contextmanager
def adapter(model: nn.Module, taps: tuple[int, ...] = ()) -> Iterator[TargetAdapter]:
    """The model under its adapter, put back afterwards."""
    target = adapt(model)
    target.tap(taps)
    try:
        yield target
    finally:
        target.close()


def dflash_checkpoint(
    folder: Path,
    *,
    hidden: int,
    vocab: int,
    taps: tuple[int, ...],
    seed: int = 0,
    drop: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """Write a random DFlash checkpoint in the z-lab layout.

    Args:
        folder: made if needed.
        hidden: D of the target.
        vocab: V of the target.
        taps: target layers.
        seed: of the weights.
        drop: config keys to leave out.
        **config: on top of the defaults.
    """
    settings: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "block_size": 16,
        "dflash_config": {"mask_token_id": vocab - 1, "target_layer_ids": list(taps)},
        **config,
    }
    settings = {k: v for k, v in settings.items() if k not in drop}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    weights = dflash_weights(settings, len(taps), np.random.default_rng(seed))
    mx.save_safetensors(
        str(folder / "model.safetensors"), {k: mx.array(v) for k, v in weights.items()}
    )
    return folder


def dflash_weights(
    settings: dict[str, Any], taps: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Random float32 tensors by the names of the z-lab checkpoints."""
    hidden, inner, head = (
        settings["hidden_size"], settings["intermediate_size"], settings["head_dim"],
    )  # fmt: skip
    q, kv = settings["num_attention_heads"] * head, settings["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, taps * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for i in range(settings["num_hidden_layers"]):
        layer = f"layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (q, hidden),
            layer + "self_attn.k_proj.weight": (kv, hidden),
            layer + "self_attn.v_proj.weight": (kv, hidden),
            layer + "self_attn.o_proj.weight": (hidden, q),
            layer + "self_attn.q_norm.weight": (head,),
            layer + "self_attn.k_norm.weight": (head,),
            layer + "mlp.gate_proj.weight": (inner, hidden),
            layer + "mlp.up_proj.weight": (inner, hidden),
            layer + "mlp.down_proj.weight": (hidden, inner),
        }
    weights = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape)
        value = 1 + 0.2 * noise if len(shape) == 1 else 1.6 * noise / np.sqrt(shape[-1])
        weights[name] = value.astype(np.float32)
    return weights
