"""Tiny configs of further families of mlx-lm, and what each is expected to give."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn

from draftloom.contracts import TargetAdapter
from draftloom.model_info import ModelInfo
from tests.support import pipelines
from tests.support.models import COMMON, HEAD, HIDDEN, VOCAB, randomize

__all__ = [
    "GENERIC",
    "MORE",
    "RECURRENT",
    "SLIDING",
    "WINDOW",
    "More",
    "Recorded",
    "adapted",
    "new_model",
]

WINDOW = 8


@attrs.frozen
class More:
    """A family.

    Attributes:
        name: for test ids.
        config: of a tiny one, as in config.json.
        module: of mlx_lm.models.
    """

    name: str
    config: dict[str, Any] = attrs.field(hash=False, repr=False)
    module: str

    @property
    def model_type(self) -> str:
        """As in config.json."""
        return str(self.config["model_type"])


def _more(model_type: str, *parts: dict[str, Any], name: str = "", **more: Any) -> More:
    config: dict[str, Any] = {"model_type": model_type}
    for part in parts:
        config |= part
    return More(name or model_type, config | more, model_type)


_MLA = {
    "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "qk_nope_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
_DEEPSEEK = {
    "moe_intermediate_size": 16, "n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
}  # fmt: skip
_GLM4_MOE = _DEEPSEEK | {
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "rope_scaling": None,
    "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5,
}  # fmt: skip
_GRANITE = {
    "logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_ALTERNATE = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_PATTERN = {"sliding_window": WINDOW, "sliding_window_pattern": 2}
_GEMMA3 = COMMON | HEAD | _PATTERN | {"query_pre_attn_scalar": 16}
_GEMMA4 = COMMON | HEAD | {
    "num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 2,
    "global_head_dim": 16, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 2, "tie_word_embeddings": True, "final_logit_softcapping": 5.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

PLAIN = (
    _more(
        "qwen2_moe", COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    _more("phi3", COMMON),
    _more("smollm3", COMMON, tie_word_embeddings=True),
    _more("olmo2", COMMON),
    _more("olmoe", COMMON, num_experts=4, num_experts_per_tok=2),
    _more("glm4", COMMON, HEAD, attention_bias=True, partial_rotary_factor=0.5),
    _more("glm4_moe", COMMON, HEAD, _GLM4_MOE),
    _more("ernie4_5", COMMON, HEAD, use_bias=False),
    _more("starcoder2", COMMON, tie_word_embeddings=True),
    _more("seed_oss", COMMON, HEAD),
    _more("hunyuan_v1_dense", COMMON, HEAD),
    _more("granite", COMMON, _GRANITE),
    _more("granitemoe", COMMON, _GRANITE, num_local_experts=4, num_experts_per_tok=2),
    _more("mixtral", COMMON, num_local_experts=4, num_experts_per_tok=2),
    _more("cohere", COMMON, use_qk_norm=True, logit_scale=0.5),
    _more("gemma", COMMON, HEAD),
    _more("gemma2", COMMON, HEAD, final_logit_softcapping=3.0),
    _more("minicpm", COMMON, dim_model_base=16, scale_depth=1.4, scale_emb=3.0),
    _more(
        "stablelm", COMMON, use_qkv_bias=True, partial_rotary_factor=0.5, layer_norm_eps=1e-5,
        qk_layernorm=True,
    ),
    _more("internlm3", COMMON, rope_scaling={"factor": 2.0, "rope_type": "dynamic"}),
    _more("nemotron", COMMON, hidden_act="relu2", norm_eps=1e-5),
    _more(
        "deepseek_v2", COMMON, _MLA, _DEEPSEEK, topk_method="greedy",
        rope_scaling={
            "type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0, "mscale": 1.0, "beta_fast": 32,
            "beta_slow": 1, "original_max_position_embeddings": 16,
        },
    ),
    _more("deepseek_v3", COMMON, _MLA, _DEEPSEEK),
    _more(
        "llama", COMMON, name="llama-3.1", head_dim=8,
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    _more("phi", COMMON, num_key_value_heads=4, partial_rotary_factor=0.5, layer_norm_eps=1e-5),
)  # fmt: skip
"""Attention in every layer, plain key/value caches."""

SLIDING = (
    _more("llama", COMMON, _ALTERNATE, name="llama-sliding"),
    _more("olmo3", COMMON, _ALTERNATE),
    _more("cohere2", COMMON, HEAD, _PATTERN, num_hidden_layers=4, logit_scale=0.5),
    _more("gemma3_text", _GEMMA3, num_hidden_layers=4),
    _more("gemma3", vocab_size=VOCAB, text_config=_GEMMA3 | {"model_type": "gemma3_text"}),
    _more("gemma4_text", _GEMMA4),
    _more("gemma4", vocab_size=VOCAB, text_config=_GEMMA4 | {"model_type": "gemma4_text"}),
    _more(
        "gpt_oss", COMMON, HEAD, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=WINDOW, num_hidden_layers=4,
    ),
    _more(
        "exaone4", COMMON, HEAD, rope_scaling={"rope_type": "default"}, sliding_window=WINDOW,
        sliding_window_pattern="LG", num_hidden_layers=4,
    ),
    _more(
        "ministral3", COMMON, HEAD, _ALTERNATE,
        rope_parameters={
            "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16, "type": "default",
        },
    ),
    _more(
        "mistral3",
        text_config=COMMON | HEAD | _ALTERNATE | {
            "model_type": "ministral3",
            "rope_parameters": {
                "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16, "type": "default",
            },
        },
    ),
)  # fmt: skip
"""Attention in every layer, a sliding window in some."""

MORE = {family.name: family for family in (*PLAIN, *SLIDING)}
"""Further families of the attention adapter."""

_MAMBA2 = {
    "num_heads": 4, "head_dim": 16, "state_size": 8, "layer_norm_epsilon": 1e-5, "conv_kernel": 4,
    "n_groups": 1, "use_bias": False, "use_conv_bias": True, "time_step_limit": [0.0, 100.0],
    "time_step_rank": 4,
}  # fmt: skip
_JAMBA = {
    "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
    "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2,
    "num_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 4,
}  # fmt: skip

GENERIC = {
    family.name: family
    for family in (
        _more("gpt_neox", COMMON, layer_norm_eps=1e-5, rotary_emb_base=10000, rotary_pct=0.5),
        _more(
            "gpt2", COMMON, n_ctx=128, n_embd=HIDDEN, n_head=4, n_layer=3, n_positions=128,
            layer_norm_epsilon=1e-5,
        ),
        _more(
            "lfm2", COMMON, norm_eps=1e-5, conv_bias=False, conv_L_cache=3, block_dim=HIDDEN,
            block_multiple_of=8, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False,
            block_ff_dim=48, full_attn_idxs=[1], rope_theta=1e4,
        ),
        _more(
            "nemotron_h", COMMON, num_hidden_layers=4, hybrid_override_pattern=["M", "*", "-", "M"],
            attention_bias=False, mamba_num_heads=4, mamba_head_dim=16, mamba_proj_bias=False,
            ssm_state_size=8, conv_kernel=4, n_groups=1, mlp_bias=False, layer_norm_epsilon=1e-5,
            use_bias=False, use_conv_bias=True, head_dim=8,
        ),
        _more(
            "falcon_h1", COMMON, HEAD, mamba_d_conv=4, mamba_d_head=16, mamba_d_ssm=64,
            mamba_d_state=8, mamba_n_heads=4, mlp_multipliers=[0.9, 0.6],
            ssm_multipliers=[0.5, 0.6, 0.4, 0.5, 0.7],
        ),
        _more(
            "mamba", COMMON, state_size=8, conv_kernel=4, use_bias=False, use_conv_bias=True,
            time_step_rank=4, tie_word_embeddings=True,
        ),
        _more("mamba2", COMMON, _MAMBA2),
        _more(
            "rwkv7", COMMON, HEAD, norm_eps=1e-5, a_low_rank_dim=4, v_low_rank_dim=4,
            gate_low_rank_dim=4, decay_low_rank_dim=4,
        ),
        _more(
            "kimi_linear", COMMON, HEAD, _MLA, num_experts=4, moe_intermediate_size=16,
            model_max_length=512, num_hidden_layers=4, num_experts_per_token=2,
            first_k_dense_replace=1, num_shared_experts=1,
            linear_attn_config={
                "kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 8,
                "short_conv_kernel_size": 4,
            },
        ),
        _more("jamba", COMMON, _JAMBA),
        _more(
            "plamo2", COMMON, num_hidden_layers=4, hidden_size_per_head=8, mamba_d_state=8,
            mamba_num_heads=4, mamba_step=2, tie_word_embeddings=True,
        ),
        _more(
            "granitemoehybrid", COMMON, _GRANITE, layer_types=["mamba", "attention", "mamba"],
            mamba_n_heads=4, mamba_d_head=16, mamba_proj_bias=False, mamba_d_state=8,
            mamba_d_conv=4, mamba_n_groups=1, mamba_conv_bias=True, shared_intermediate_size=16,
        ),
        _more(
            "recurrent_gemma", COMMON, attention_bias=False, conv1d_width=4, logits_soft_cap=5.0,
            attention_window_size=WINDOW, block_types=["recurrent", "recurrent", "attention"],
            num_key_value_heads=1,
        ),
        _more(
            "deepseek_v32", COMMON, _MLA, _DEEPSEEK, index_head_dim=8, index_n_heads=2, index_topk=6
        ),
        _more(
            "llama4_text", COMMON, HEAD, intermediate_size_mlp=48, no_rope_layers=[1, 0, 1],
            use_qk_norm=True,
        ),
    )
}  # fmt: skip
"""Families of the generic adapter."""


RECURRENT = {
    name: GENERIC.pop(name)
    for name in (
        "lfm2",
        "nemotron_h",
        "falcon_h1",
        "mamba2",
        "granitemoehybrid",
        "kimi_linear",
    )
} | {
    "lfm2_moe": _more(
        "lfm2_moe", COMMON, norm_eps=1e-5, conv_bias=False, conv_L_cache=3, full_attn_idxs=[1],
        rope_theta=1e4, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, num_dense_layers=1, use_expert_bias=True,
    ),
}  # fmt: skip
"""Families of the recurrent adapter, which record a tape."""


def new_model(family: More, seed: int = 0) -> nn.Module:
    """A new model; the same seed gives the same weights."""
    module = importlib.import_module(f"mlx_lm.models.{family.module}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(_copy(family.config)))
    if not hasattr(model, "args"):  # plamo2; what a loaded model is described from
        model.args = model.config
    randomize(model, seed)
    model.eval()
    return model


@contextmanager
def adapted(family: More, taps: tuple[int, ...] = ()) -> Iterator[TargetAdapter]:
    """A new model under the adapter that claims its config, put back afterwards."""
    info = ModelInfo(family.name, None, family.config)
    factory = pipelines.plugins().adapter_for(info).load()
    target: TargetAdapter = factory(new_model(family), factory.describe(info))
    target.tap(taps)
    try:
        yield target
    finally:
        target.close()


def _copy(value: Any) -> Any:
    """A copy of nested tables: mlx-lm's arguments edit them."""
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return list(value) if isinstance(value, list) else value


class _Recorder(nn.Module):
    """Calls a module and remembers what went in and came out."""

    def __init__(self, module: nn.Module, seen: list[tuple[mx.array, mx.array]]) -> None:
        super().__init__()
        self.module = module
        object.__setattr__(self, "_seen", seen)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        self._seen.append((args[0], output[0] if isinstance(output, tuple) else output))
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self:
                raise
            return getattr(self["module"], name)


class Recorded:
    """A model whose layers and final norm tell what went through them.

    Attributes:
        seen: (input, output) of each layer and of the norm, in order of their calls.
    """

    def __init__(self, model: nn.Module, inner: Any, layers: str, norm: str) -> None:
        self.seen: list[tuple[mx.array, mx.array]] = []
        self._model, self._inner, self._layers, self._norm = model, inner, layers, norm

    def run(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits of tokens; fills `seen` anew."""
        self.seen.clear()
        layers = self._inner[self._layers]
        kept, norm = list(layers), self._inner[self._norm]
        layers[:] = [_Recorder(layer, self.seen) for layer in kept]
        self._inner[self._norm] = _Recorder(norm, self.seen)
        try:
            logits: mx.array = self._model(tokens, cache=cache)
        finally:
            layers[:] = kept
            self._inner[self._norm] = norm
        return logits
