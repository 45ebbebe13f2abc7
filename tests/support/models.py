"""Tiny random models of every family, built from mlx-lm's own classes.

Weights are float32 and scaled so that texts vary, states remember (decays of 0.7 to 1), and a
state, tap or residual that is wrong changes tokens.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

__all__ = [
    "ATTENTION",
    "CANDIDATES",
    "FAMILIES",
    "HIDDEN",
    "HYBRID",
    "VOCAB",
    "Family",
    "build",
    "new",
    "randomize",
    "stock",
]

VOCAB = 24
HIDDEN = 32


@attrs.frozen
class Family:
    """A kind of model.

    Attributes:
        name: for test ids.
        module: of mlx_lm.models.
        config: of a tiny one, as in config.json.
    """

    name: str
    module: str
    config: dict[str, Any] = attrs.field(hash=False, repr=False)


def _family(name: str, module: str, *parts: dict[str, Any], **more: Any) -> Family:
    config: dict[str, Any] = {"model_type": module}
    for part in parts:
        config |= part
    return Family(name, module, config | more)


COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
HEAD = {"head_dim": 8}
GATED_DELTA = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
ROPE_PARAMETERS = {
    "rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
SHARED_EXPERT = {"shared_expert_intermediate_size": 16}

_QWEN3_5 = (COMMON, HEAD, GATED_DELTA, ROPE_PARAMETERS)
_QWEN3_NEXT = (
    COMMON, HEAD, GATED_DELTA, EXPERTS, SHARED_EXPERT,
    {"mlp_only_layers": [], "partial_rotary_factor": 0.5},
)  # fmt: skip

HYBRID = (
    _family("qwen3_5", "qwen3_5", *_QWEN3_5),
    _family("qwen3_5-v2", "qwen3_5", *_QWEN3_5, linear_num_value_heads=4),
    _family(
        "qwen3_5-v4-conv3", "qwen3_5", *_QWEN3_5, linear_num_key_heads=1,
        linear_num_value_heads=4, linear_value_head_dim=4, linear_conv_kernel_dim=3,
        full_attention_interval=4,
    ),
    _family("qwen3_5-tied", "qwen3_5", *_QWEN3_5, tie_word_embeddings=True),
    _family("qwen3_5-experts", "qwen3_5", *_QWEN3_5, EXPERTS, SHARED_EXPERT),
    _family(
        "qwen3_5_moe", "qwen3_5_moe", *_QWEN3_5, EXPERTS, SHARED_EXPERT, linear_num_value_heads=4
    ),
    _family("qwen3_next", "qwen3_next", *_QWEN3_NEXT),
    _family("qwen3_next-v4", "qwen3_next", *_QWEN3_NEXT, linear_num_value_heads=8),
)  # fmt: skip

ATTENTION = (
    _family("qwen2", "qwen2", COMMON),
    _family("qwen3", "qwen3", COMMON, HEAD),
    _family("qwen3_moe", "qwen3_moe", COMMON, HEAD, EXPERTS, mlp_only_layers=[]),
    _family("llama", "llama", COMMON),
    _family("llama-tied", "llama", COMMON, tie_word_embeddings=True),
    _family("mistral", "llama", COMMON, head_dim=16, model_type="mistral"),
)

FAMILIES = {family.name: family for family in (*HYBRID, *ATTENTION)}
"""The families that the built-in adapters serve and that are exact on the CPU."""

SLIDING = _family(
    "llama-sliding", "llama", COMMON, sliding_window=8,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)  # fmt: skip
"""Served as well, but a window that has wrapped changes the order of keys: ~1e-5."""

_GLM4_MOE = {
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "n_routed_experts": 4,
    "routed_scaling_factor": 1.0, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "norm_topk_prob": True, "use_qk_norm": True,
    "attention_bias": True, "partial_rotary_factor": 0.5, "rope_scaling": None,
}  # fmt: skip
CANDIDATES = (
    _family("phi3", "phi3", COMMON),
    _family("smollm3", "smollm3", COMMON, tie_word_embeddings=True),
    _family("olmo2", "olmo2", COMMON),
    _family("glm4", "glm4", COMMON, HEAD, attention_bias=True, partial_rotary_factor=0.5),
    _family("glm4_moe", "glm4_moe", COMMON, HEAD, _GLM4_MOE),
    _family("ernie4_5", "ernie4_5", COMMON, HEAD, use_bias=False),
    _family("starcoder2", "starcoder2", COMMON),
    _family("starcoder2-tied", "starcoder2", COMMON, tie_word_embeddings=True),
    _family("seed_oss", "seed_oss", COMMON, HEAD),
    _family("seed_oss-tied", "seed_oss", COMMON, HEAD, tie_word_embeddings=True),
    _family("hunyuan_v1_dense", "hunyuan_v1_dense", COMMON, HEAD),
    _family(
        "granite", "granite", COMMON, logits_scaling=2.0, attention_multiplier=0.3,
        embedding_multiplier=3.0, residual_multiplier=0.7, attention_bias=False, mlp_bias=False,
    ),
    _family("mixtral", "mixtral", COMMON, num_local_experts=4, num_experts_per_tok=2),
)  # fmt: skip
"""Families that mlx-lm has with plain key/value caches and no adapter claims (yet)."""


def new(family: Family, seed: int = 0, **changes: Any) -> nn.Module:
    """A new model of a family; the same seed gives the same weights.

    Args:
        family: which.
        seed: of the weights.
        **changes: of the config.
    """
    module = importlib.import_module(f"mlx_lm.models.{family.module}")
    # A copy of nested tables too: mlx-lm's args edit them.
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in family.config.items()} | changes
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    randomize(model, seed)
    model.eval()
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Fill a model with random float32 weights, in the order of its parameters' names."""
    rng = np.random.default_rng(seed)
    parameters = sorted(tree_flatten(model.parameters()))
    tied = not any("lm_head" in name for name, _ in parameters)
    weights = [
        (name, mx.array(_weight(rng, name, value.shape, tied).astype(np.float32)))
        for name, value in parameters
    ]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())


def _weight(rng: np.random.Generator, name: str, shape: tuple[int, ...], tied: bool) -> np.ndarray:
    noise = rng.standard_normal(shape)
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.02, 0.4, shape))
    if name.endswith("dt_bias"):
        return 0.3 * noise
    if "embed_tokens" in name:  # as a head, large ones would make every token predict itself
        return 0.4 * noise if tied else noise
    if name.endswith("bias"):  # of a projection, or of an expert's score
        return 0.2 * noise
    if len(shape) <= 1:  # a norm, or a factor
        return 1 + 0.2 * noise
    if "conv1d" in name:
        return 0.6 * noise
    gain = 2.5 if "lm_head" in name else 1.6
    return gain * noise / np.sqrt(shape[-1])


@lru_cache(maxsize=64)
def stock(name: str, seed: int = 0) -> nn.Module:
    """The model of a family that nothing wraps: what plain mlx-lm runs."""
    return new(FAMILIES[name], seed)


@lru_cache(maxsize=64)
def build(name: str, seed: int = 0) -> nn.Module:
    """A second model with the weights of `stock`, for adapters to wrap; one at a time."""
    return new(FAMILIES[name], seed)
