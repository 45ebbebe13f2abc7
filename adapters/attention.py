"""Adapter for pure-attention models whose caches are key/value caches, sliding windows included."""

from __future__ import annotations

from draftloom.contracts import TargetInfo
from draftloom.model_info import ModelInfo

from .parts import why_no_taps
from .whole import WholeModelAdapter, describe_whole

__all__ = ["FURTHER_MODEL_TYPES", "MODEL_TYPES", "AttentionAdapter"]

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral")
"""Model types whose taps, head and logits are tested against stock mlx-lm."""

FURTHER_MODEL_TYPES = (
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gemma4_text",
    "glm4",
    "glm4_moe",
    "gpt_oss",
    "granite",
    "granitemoe",
    "hunyuan_v1_dense",
    "internlm3",
    "minicpm",
    "ministral3",
    "mistral3",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi",
    "phi3",
    "qwen2_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""Tested in the same way, with factors, soft caps, experts, sliding windows or shared caches."""


class AttentionAdapter(WholeModelAdapter):
    """Serves a model whose layers all attend; the forward is mlx-lm's own."""

    @classmethod
    def claims(cls, model: ModelInfo) -> bool:
        """Whether the model type is one of `MODEL_TYPES` or `FURTHER_MODEL_TYPES`."""
        return model.model_type in MODEL_TYPES or model.model_type in FURTHER_MODEL_TYPES

    @classmethod
    def describe(cls, model: ModelInfo) -> TargetInfo:
        """What the target is, from its config."""
        return describe_whole(model, "attention", why_no_taps)
