"""Every model module of mlx-lm: the smallest config that can be made for it, and its outcome."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from functools import lru_cache
from typing import Any

import attrs
import mlx_lm.models

from draftloom.contracts import TargetInfo
from draftloom.errors import DraftloomError
from draftloom.model_info import ModelInfo
from tests.support import models, pipelines
from tests.support.families_more import GENERIC, MORE, RECURRENT, WINDOW, More

__all__ = ["NOT_RUN", "Outcome", "outcomes", "tested_types"]

NOT_RUN = ("phi3small", "phixtral", "plamo3", "talkie")
"""Served, as far as their configs tell, but not run here: with phi3small stock mlx-lm itself ends
the process at this size, and some of the others are not small by the general rule."""

_LAYERS = models.COMMON["num_hidden_layers"]
_ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]
_BOTH_ROPES = {
    kind: {"rope_type": "default", "rope_theta": 1e4}
    for kind in ("sliding_attention", "full_attention")
}
_SWA = {
    "hybrid_layer_pattern": [1, 0, 1], "moe_layer_freq": [0, 1, 1], "sliding_window_size": WINDOW,
    "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "n_group": 1,
    "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "head_dim": 8,
    "v_head_dim": 8, "swa_head_dim": 8, "swa_v_head_dim": 8, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.5,
    "layernorm_epsilon": 1e-6,
}  # fmt: skip
_OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 32, "num_layers": 4, "num_kv_reuse_layers": 1, "num_heads": 4,
             "num_kv_heads": 2},
    "exaone_moe": {"layer_types": _ALTERNATE, "is_moe_layer": [False, True, True],
                   "sliding_window": WINDOW, "n_group": 1, "topk_group": 1,
                   "topk_method": "noaux_tc"},
    "glm4_moe_lite": {"topk_method": "noaux_tc"},
    "glm_moe_dsa": {"topk_method": "noaux_tc"},
    "gptj": {"rotary_dim": 4, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "hunyuan": {"moe_topk": 2, "num_experts": 4, "num_shared_expert": 1, "use_cla": False,
                "cla_share_factor": 2, "use_mixed_mlp_moe": True, "use_qk_norm": True,
                "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
    "lille-130m": {"n_embd": 32, "n_head": 4, "n_kv_heads": 2, "n_layer": 3, "block_size": 128,
                   "layer_norm_eps": 1e-5},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "num_layers": 2,
                      "attention_method": "MLA", "zero_expert_type": "identity",
                      "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 1,
                      "moe_topk": 2},
    "lfm2-vl": {"text_config": dict(RECURRENT["lfm2"].config)},
    "llama4": {"text_config": dict(GENERIC["llama4_text"].config) | {
        "attention_bias": False, "attention_chunk_size": 8, "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1, "num_local_experts": 2, "rope_scaling": None,
    }},
    "minicpm3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0],
                                  "long_factor": [1.0, 1.0],
                                  "original_max_position_embeddings": 16}},
    "qwen3_vl_moe": {"text_config": dict(models.FAMILIES["qwen3_moe"].config)},
    "mellum": {"layer_types": _ALTERNATE, "rope_parameters": _BOTH_ROPES, "num_experts": 4,
               "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "mimo_v2_flash": _SWA,
    "openelm": {"model_dim": 32, "num_transformer_layers": 3, "head_dim": 8, "ffn_dim_divisor": 8,
                "num_query_heads": [4] * 3, "num_kv_heads": [2] * 3, "ffn_multipliers": [1.0] * 3},
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 8, "num_attention_heads": 4, "intermediate_size": 96},
    "solar_open": {"topk_method": "noaux_tc"},
    "spark2_5": {"layer_types": _ALTERNATE, "rope_parameters": _BOTH_ROPES,
                 "sliding_window": WINDOW, "hidden_act": "gelu"},
}  # fmt: skip
"""What the general rule does not guess."""
_OVERRIDES["longcat_flash_ngram"] = _OVERRIDES["longcat_flash"] | {
    "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 2, "emb_split_num": 2,
}  # fmt: skip


@attrs.frozen
class Outcome:
    """What came of a module.

    Attributes:
        name: of the module.
        family: its tiny config; None where none was made.
        target: what the generic adapter makes of it; None where it is not served.
        reason: why it is not served, or not tried; empty where it is.
        tried: whether the reason is draftloom's own refusal of a config that fits.
    """

    name: str
    family: More | None
    target: TargetInfo | None
    reason: str
    tried: bool = True


def tested_types() -> set[str]:
    """Model types with families of their own in the tests."""
    further = (MORE | GENERIC | RECURRENT).values()
    return {f.model_type for f in further} | {
        str(f.config["model_type"]) for f in models.FAMILIES.values()
    }


@lru_cache(maxsize=1)
def _known() -> dict[str, Any]:
    """A small value for every name that some tested family has."""
    found: dict[str, Any] = {}
    for family in (*MORE.values(), *GENERIC.values(), *RECURRENT.values()):
        found = family.config | found
    for plain in models.FAMILIES.values():
        found = plain.config | found
    return found | models.COMMON | models.HEAD


def _config(name: str, arguments: Any) -> dict[str, Any]:
    """Every required field, and every one whose name is known."""
    config: dict[str, Any] = {"model_type": name}
    for field in dataclasses.fields(arguments):
        missing = dataclasses.MISSING
        required = field.default is missing and field.default_factory is missing
        if field.name == "model_type":
            continue
        if field.name in _known():
            config[field.name] = _known()[field.name]
        elif required:
            kind = getattr(field.type, "__name__", "int")
            config[field.name] = {"float": 1.0, "bool": False, "str": "x"}.get(kind, 4)
    return config | _OVERRIDES.get(name, {})


def _outcome(name: str) -> Outcome | None:
    try:
        module = importlib.import_module(f"mlx_lm.models.{name}")
    except SystemExit:  # mlx-lm ends the process where a package is missing
        info = ModelInfo(name, None, {"model_type": name})
        try:
            pipelines.plugins().adapter_for(info).load().describe(info)
        except DraftloomError as error:
            return Outcome(name, None, None, error.message)
        raise AssertionError(name) from None
    if not (hasattr(module, "Model") and hasattr(module, "ModelArgs")):
        return None
    config = _config(name, module.ModelArgs)
    info = ModelInfo(name, None, config)
    try:
        target = pipelines.plugins().adapter_for(info).load().describe(info)
    except DraftloomError as error:
        refused = any(w in error.message for w in ("cannot be served", "No Metal back-end"))
        return Outcome(name, None, None, error.message, tried=refused)
    return Outcome(name, More(name, config, name), target, "")


@lru_cache(maxsize=1)
def outcomes() -> tuple[Outcome, ...]:
    """Of every module of mlx_lm.models that holds a model and has no family of its own."""
    names = sorted(m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__))
    found = (_outcome(name) for name in names if name not in tested_types())
    return tuple(outcome for outcome in found if outcome is not None)
