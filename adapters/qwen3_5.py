"""Adapter for the Qwen3.5 hybrids: gated-delta layers with attention between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.qwen3_5 import GatedDeltaNet
from mlx_lm.models.qwen3_next import Qwen3NextGatedDeltaNet

from draftloom.contracts import CacheKind, TargetInfo
from draftloom.errors import UnsupportedModelError, UsageError
from draftloom.kernel_settings import KernelSettings
from draftloom.kv_cache import KVQuantization
from draftloom.model_info import ModelInfo

from .base import MlxLmAdapter, describe_model, language_model, sketch
from .gated_delta import RecordingMixer, project_qwen3_5, project_qwen3_next
from .quantized_kv import why_not_quantized_kv

__all__ = ["MODEL_TYPES", "HybridAdapter"]

MODEL_TYPES = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
_PROJECTIONS = {GatedDeltaNet: project_qwen3_5, Qwen3NextGatedDeltaNet: project_qwen3_next}


class HybridAdapter(MlxLmAdapter):
    """Serves qwen3_5, qwen3_5_moe and qwen3_next: taps, and a tape in every gated-delta layer."""

    def __init__(self, model: nn.Module, info: TargetInfo) -> None:
        super().__init__(model, info)
        self._mixers: list[tuple[nn.Module, nn.Module]] = []
        recurrent = [layer for layer in self._text.model.layers if layer.is_linear]
        for layer in recurrent:
            if isinstance(layer.linear_attn, RecordingMixer):
                raise UsageError(
                    f"{info.name} is in use by another pipeline", "close that one first"
                )
            if getattr(layer.linear_attn, "sharding_group", None) is not None:
                raise UnsupportedModelError(f"{info.name} is sharded over processes")
        for layer in recurrent:
            mixer = layer.linear_attn
            self._mixers.append((layer, mixer))
            layer.linear_attn = RecordingMixer(mixer, _PROJECTIONS[type(mixer)])

    def tune(self, settings: KernelSettings) -> None:
        """Choose the kernels of the gated-delta layers; pack projections."""
        super().tune(settings)
        for layer, _ in self._mixers:
            layer.linear_attn.tune(settings)

    @classmethod
    def claims(cls, model: ModelInfo) -> bool:
        """Whether the model type is one of `MODEL_TYPES`."""
        return model.model_type in MODEL_TYPES

    @classmethod
    def describe(cls, model: ModelInfo) -> TargetInfo:
        """What the target is, from its config."""
        info, skeleton = describe_model(model, "qwen3-5")
        kinds = tuple(
            CacheKind.GATED_DELTA if layer.is_linear else kind
            for layer, kind in zip(
                language_model(skeleton).model.layers, info.cache_kinds, strict=True
            )
        )
        return attrs.evolve(info, cache_kinds=kinds, tape_kinds=(CacheKind.GATED_DELTA,))

    @classmethod
    def sketch(cls, model: ModelInfo, dtype: mx.Dtype) -> tuple[Callable[..., Any], list[Any]]:
        """The model without weights, to be run lazily, and fresh caches."""
        return sketch(model, dtype)

    @classmethod
    def why_not_quantized_kv(cls, model: ModelInfo, settings: KVQuantization) -> str:
        """Why the caches of a model cannot be packed so; empty where they can."""
        return why_not_quantized_kv(model, settings)

    def close(self) -> None:
        """Put every replaced layer and mixer back."""
        super().close()
        for layer, mixer in self._mixers:
            layer.linear_attn = mixer
        self._mixers.clear()
