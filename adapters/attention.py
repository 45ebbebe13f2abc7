"""Adapter for pure-attention models whose caches are key/value caches."""

from __future__ import annotations

from draftloom.contracts import TargetInfo
from draftloom.model_info import ModelInfo

from .base import MlxLmAdapter, describe_model

__all__ = ["MODEL_TYPES", "AttentionAdapter"]

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral")
"""Model types whose taps, head and logits are tested against stock mlx-lm."""


class AttentionAdapter(MlxLmAdapter):
    """Serves a model whose layers all attend; the forward is mlx-lm's own."""

    @classmethod
    def claims(cls, model: ModelInfo) -> bool:
        """Whether the model type is one of `MODEL_TYPES`."""
        return model.model_type in MODEL_TYPES

    @classmethod
    def describe(cls, model: ModelInfo) -> TargetInfo:
        """What the target is, from its config."""
        return describe_model(model, "attention")[0]
